"""One module as a folder: `config.json` and safetensors weights, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoint.files import whole_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_module(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    keep: Sequence[str] = (),
) -> None:
    """Write weights (cast to `dtype` if given) and config; an old folder is replaced only by a whole new one.

    Files of the old folder named in `keep` are carried over.
    """
    tensors = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in weights.items()}
    with whole_folder(folder) as beside:
        save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
        (beside / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        for name in keep:
            if (folder / name).is_file():
                shutil.copy2(folder / name, beside / name)


def read_module(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config without its class name, weights in float32). Raises ValueError when a file is missing."""
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}; expected a folder with config.json and {WEIGHTS}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / WEIGHTS).items()}
    return {k: v for k, v in config.items() if not k.startswith("_")}, weights
