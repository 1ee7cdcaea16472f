"""IP-Adapters in files as published: `image_proj.*` and `ip_adapter.N.to_k_ip.weight`, read and written.

The files hold no settings: all of them are told by shapes. Ours name their base and image encoder beside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import weights
from ldm.checkpoint.files import whole_folder
from ldm.checkpoint.opened import fill
from ldm.checkpoint.pickled import read_pickled
from ldm.checkpoint.settings import read_json, write_json
from ldm.checkpoint.weights import Source
from ldm.models.unet.image_prompt import HEAD, IPAdapter, IPAdapterConfig, Kind

NAME = "ip_adapter.safetensors"
ABOUT = "ip_adapter.json"
PARTS = ("image_proj", "ip_adapter")
_LAYER = re.compile(r"ip_adapter\.(\d+)\.to_k_ip\.weight$")
_PLAIN, _FULL, _PLUS = "image_proj.proj.weight", "image_proj.proj.3.weight", "image_proj.latents"
_OTHERS = {
    "image_proj.perceiver_resampler.": "a FaceID Plus, which sees faces by an encoder of their own",
    "image_proj.proj.0.": "a FaceID, which sees faces by an encoder of their own",
    "ip_adapter.0.to_k_ip.": "one of a transformer",
}


@dataclass(frozen=True)
class About:
    """What stands beside an adapter that was trained here; `encoder`: the name of its image encoder."""

    base: str
    encoder: str


def ip_adapter_in(source: str | Path) -> Path | None:
    """The file at a path: itself, in a folder or in a run's export; None if none."""
    path = Path(source)
    found = (path, path / NAME, path / "export" / NAME)
    return next((p for p in found if p.is_file()), None)


def about(file: Path) -> About | None:
    """What was written beside a file; None of one that was published by others."""
    note = file.parent / ABOUT
    if file.name != NAME or not note.is_file():
        return None
    told = read_json(note)
    return About(str(told.get("base", "")), str(told.get("image_encoder", "")))


def open_ip_adapter(source: str | Path) -> tuple[IPAdapterConfig, Source, Path]:
    """Its settings, its tensors, not read yet, and its file.

    Raises ValueError where there is none, and for another thing, naming it.
    """
    file = ip_adapter_in(source)
    if file is None:
        what = "no such file or folder" if not Path(source).exists() else f"no {NAME} in this folder"
        raise ValueError(f"{source}: no IP-Adapter: {what}")
    found = _read(file)
    if not any(k.startswith("image_proj.") for k in found) or not any(_LAYER.match(k) for k in found):
        who = next((what for mark, what in _OTHERS.items() if any(k.startswith(mark) for k in found)), None)
        raise ValueError(f"{file}: no IP-Adapter{': it is ' + who if who else _names(found)}")
    return _from_shapes(found, file), found, file


def load_ip_adapter(source: str | Path, *, dtype: torch.dtype = torch.float32) -> IPAdapter:
    """A frozen IP-Adapter from a published file, a run or its export.

    Raises ValueError for anything else, naming it, and for tensors that are missing or not known.
    """
    config, found, file = open_ip_adapter(source)
    weights.check_keys(f"{file}: IP-Adapter", _shapes(config), weights.shapes(found))
    model = fill(_empty(config), found, dtype, str(file))
    assert isinstance(model, IPAdapter)
    return model.requires_grad_(False)


def save_ip_adapter(
    folder: Path, config: IPAdapterConfig, state: Mapping[str, Tensor], told: About, *, dtype: torch.dtype | None = None
) -> None:
    """Write the published file and what it belongs to, whole or not at all.

    Raises ValueError for tensors that are not those of the settings.
    """
    source = weights.of_state(state)
    weights.check_keys(f"{folder}: IP-Adapter", _shapes(config), weights.shapes(source))
    with whole_folder(folder) as beside:
        weights.write_file(beside / NAME, source, dtype=dtype)
        write_json(beside / ABOUT, {"base": told.base, "image_encoder": told.encoder, "kind": config.kind})


def _read(file: Path) -> Source:
    """The tensors of a file; of the nested pickled form by the same names."""
    if not weights.is_pickled(file):
        return weights.open_file(file)
    data = read_pickled(file)
    if isinstance(data, dict) and all(isinstance(data.get(part), dict) for part in PARTS):
        flat = {f"{part}.{k}": v for part in PARTS for k, v in data[part].items() if isinstance(v, Tensor)}
        return weights.of_state(flat)
    return weights.open_file(file)


def _from_shapes(source: Source, file: Path) -> IPAdapterConfig:
    numbers = sorted(int(m[1]) for m in map(_LAYER.match, source) if m)
    if numbers != list(range(1, 2 * len(numbers), 2)):
        who = _OTHERS["ip_adapter.0.to_k_ip."] if 0 in numbers else f"numbers {numbers[:4]} of layers, not 1, 3, 5, ..."
        raise ValueError(f"{file}: no IP-Adapter of a U-Net: {who}")
    for mark, what in _OTHERS.items():
        if any(k.startswith(mark) for k in source) and _FULL not in source:
            raise ValueError(f"{file}: an IP-Adapter that is not supported: {what}")
    keys = [source[f"ip_adapter.{n}.to_k_ip.weight"].shape for n in numbers]
    layers, width = tuple(shape[0] for shape in keys), keys[0][1]
    if any("_lora." in k for k in source):
        raise ValueError(f"{file}: an IP-Adapter that is not supported: it has a LoRA in it, as those of faces have")
    kind: Kind = "plain" if _PLAIN in source else "plus" if _PLUS in source else "full"
    if kind == "plain":
        made, features = source[_PLAIN].shape
        if made % width:
            raise ValueError(f"{file}: {_PLAIN} of {made} rows makes no tokens of {width}")
        return IPAdapterConfig(features=features, width=width, layers=layers, tokens=made // width)
    if kind == "full":
        if _FULL not in source:
            raise ValueError(f"{file}: no known projection of the picture{_names(source)}")
        features = source["image_proj.proj.0.weight"].shape[1]
        return IPAdapterConfig(kind="full", features=features, width=width, layers=layers)
    hidden = source[_PLUS].shape[2]
    heads = source["image_proj.layers.0.0.to_q.weight"].shape[0] // HEAD
    depth = 1 + max(int(k.split(".")[2]) for k in source if k.startswith("image_proj.layers."))
    return IPAdapterConfig(
        kind="plus", features=source["image_proj.proj_in.weight"].shape[1], width=width, layers=layers,
        tokens=source[_PLUS].shape[1], hidden=hidden, heads=heads, depth=depth,
    )  # fmt: skip


def _shapes(config: IPAdapterConfig) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in _empty(config).state_dict().items()}


def _empty(config: IPAdapterConfig) -> IPAdapter:
    with torch.device("meta"):
        return IPAdapter(config)


def _names(source: Source) -> str:
    heads = list(dict.fromkeys(".".join(k.split(".")[:2]) for k in sorted(source)))
    return f": its tensors are {', '.join(heads[:4])}{', ...' if len(heads) > 4 else ''}"
