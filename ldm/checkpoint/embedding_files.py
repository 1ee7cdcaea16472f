"""Textual-inversion files both ways: diffusers' `learned_embeds.safetensors`, and A1111's forms.

A1111 reads `emb_params` (n, D) from safetensors, `clip_l` and `clip_g` for SDXL, and older `.pt` files with
`string_to_param`; the token's name is the file's there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.words import expanded

NAME = "learned_embeds.safetensors"
Format = Literal["diffusers", "a1111", "a1111_pt"]
_TOWERS = ("clip_l", "clip_g")


def write_embeddings(path: Path, concepts: Mapping[str, Sequence[Tensor]], *, form: Format = "diffusers") -> None:
    """Write token -> rows (n, D) of each tower.

    "diffusers": token -> rows in one file; two towers as clip_l and clip_g, one token a file. Raises ValueError for
    what a form cannot hold.
    """
    two = any(len(rows) > 1 for rows in concepts.values())
    if (form != "diffusers" or two) and len(concepts) != 1:
        raise ValueError(f"form {form!r}: holds one token a file, got {sorted(concepts)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {
        t: [r.detach().to("cpu", torch.float32, copy=True).contiguous() for r in rows] for t, rows in concepts.items()
    }
    token, rows = next(iter(plain.items()))
    if form == "a1111_pt":
        if two:
            raise ValueError("form 'a1111_pt': holds one text tower, got two; use 'a1111'")
        torch.save(_old(token, rows[0]), path)
        return
    if two:
        tensors: dict[str, Tensor] = dict(zip(_TOWERS, rows, strict=True))
    elif form == "a1111":
        tensors = {"emb_params": rows[0]}
    else:
        tensors = {t: r[0] for t, r in plain.items()}
    save_file(tensors, path, metadata={"format": "pt", "name": token})


def _old(token: str, rows: Tensor) -> dict[str, Any]:
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": rows},
        "name": token,
        "step": None,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }


def read_embeddings(path: str | Path, token: str | None = None) -> dict[str, list[Tensor]]:
    """Token -> rows (n, D) of each tower, from a file or a folder that holds `learned_embeds.safetensors`.

    `token` renames the only one; a form without a name takes the file's. Raises ValueError for other files.
    """
    path = Path(expanded(str(path)))
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"embedding {str(path)!r}: no such file, nor a folder that holds {NAME}")
    tree, name = _open(path)
    where = f"embedding {str(path)!r}"
    if "string_to_param" in tree:
        found = {str(tree.get("name") or path.stem): [_rows(v, where) for v in tree["string_to_param"].values()][:1]}
    elif set(tree) == set(_TOWERS):
        found = {name or path.stem: [_rows(tree[k], where) for k in _TOWERS]}
    elif len(tree) == 1 and next(iter(tree)) in ("emb_params", *_TOWERS):
        found = {name or path.stem: [_rows(next(iter(tree.values())), where)]}
    else:
        found = {str(k): [_rows(v, where)] for k, v in tree.items()}
    if token is not None:
        if len(found) != 1:
            raise ValueError(f"{where}: holds {sorted(found)}, so one name {token!r} is not enough")
        found = {token: next(iter(found.values()))}
    return found


def _open(path: Path) -> tuple[dict[str, Any], str | None]:
    """(tensors or A1111's tree, the name in the header)."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as handle:
                tensors = {k: handle.get_tensor(k) for k in handle.keys()}  # noqa: SIM118 (not a dict)
                return tensors, (handle.metadata() or {}).get("name")
        except SafetensorError as error:
            raise ValueError(f"embedding {str(path)!r}: not a safetensors file: {error}") from error
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names no class of its own for these
        raise ValueError(f"embedding {str(path)!r}: not readable without running code from it") from error
    if not isinstance(tree, dict):
        raise ValueError(f"embedding {str(path)!r}: expected names and tensors")
    return tree, None


def _rows(value: Any, where: str) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim not in (1, 2):
        raise ValueError(f"{where}: expected vectors, got {type(value).__name__}")
    return value.detach().float().view(-1, value.shape[-1])
