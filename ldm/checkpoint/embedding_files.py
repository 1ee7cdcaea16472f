"""Textual-inversion files both ways: diffusers' `learned_embeds.safetensors`, and A1111's forms.

A1111 reads `emb_params` (n, D) from safetensors, `clip_l` and `clip_g` for SDXL, and older `.pt` files with
`string_to_param`; the token's name is the file's there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint import weights
from ldm.checkpoint.pickled import Inert, read_pickled
from ldm.words import expanded

NAME = "learned_embeds.safetensors"
Format = Literal["diffusers", "a1111", "a1111_pt"]
_TOWERS = ("clip_l", "clip_g", "t5xxl")
_OTHER_TOWERS = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g", "t5": "t5xxl"}
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def write_embeddings(
    path: Path,
    concepts: Mapping[str, Sequence[Tensor]],
    *,
    form: Format = "diffusers",
    names: Sequence[str] = _TOWERS[:2],
) -> None:
    """Write token -> rows (n, D) of each tower.

    "diffusers": token -> rows in one file; several towers by their `names` (clip_l, clip_g, t5xxl), one token
    a file. Raises ValueError for what a form cannot hold.
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
        tensors: dict[str, Tensor] = dict(zip(names, rows, strict=True))
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
    """Token -> rows (n, D) of each tower, from a file, a folder that holds `learned_embeds.safetensors`, or a run.

    `token` renames the only one; a form without a name takes the file's. Raises ValueError for other files.
    """
    found = read_named(path)
    if token is not None:
        if len(found) != 1:
            raise ValueError(f"embedding {str(path)!r}: holds {sorted(found)}, so one name {token!r} is not enough")
        found = {token: next(iter(found.values()))}
    return found


def read_named(path: str | Path) -> dict[str, list[Tensor]]:
    """Token -> rows (n, D) of each tower, by the names that the file itself gives."""
    path = locate_embedding(path)
    where = f"embedding {str(path)!r}"
    tree, name = _open(path)
    name, stem = name or _stem(path), _stem(path)
    known = {k: v for k, v in tree.items() if k in _TOWERS or k in _OTHER_TOWERS or k == "emb_params"}
    if "string_to_param" in tree:
        return {str(tree.get("name") or stem): [_only(tree["string_to_param"], where)]}
    if known and len(known) < len(tree):
        odd = sorted(set(tree) - set(known))
        raise ValueError(f"{where}: {odd[0]!r} beside {sorted(known)} is not known; it would be left out")
    if known:
        by_tower = {_OTHER_TOWERS.get(k, k): v for k, v in known.items()}
        return {name: [_rows(by_tower[k], where) for k in (*_TOWERS, "emb_params") if k in by_tower]}
    if odd := sorted(k for k in tree if k.endswith(("_out", "t5", "t5xxl")) or k.startswith("lora_")):
        raise ValueError(f"{where}: {odd[0]!r} is no embedding of a text tower here")
    if not tree:
        raise ValueError(f"{where}: holds no tensors")
    return {str(k): [_rows(v, where)] for k, v in tree.items()}


def check_t5(path: str | Path, *, there: bool) -> None:
    """Raise ValueError for a file with rows of T5 where the model has no T5."""
    path = locate_embedding(path)
    rows = sorted(k for k in _open(path)[0] if _OTHER_TOWERS.get(k, k) == "t5xxl")
    if rows and not there:
        raise ValueError(f"embedding {str(path)!r}: {rows[0]!r} is no embedding of a text tower here")


def file_names(path: str | Path) -> list[str]:
    """What other tools call an embedding by: its file's name, where it holds one and has a name of its own."""
    path = Path(expanded(str(path)))
    stem = _stem(path)
    own = path.is_file() and stem and not stem.startswith(("learned_embeds", "pytorch_model", "embeddings"))
    return [stem] if own and len(read_named(path)) == 1 else []


def _stem(path: Path) -> str:
    return " ".join(path.stem.split())


def locate_embedding(path: str | Path) -> Path:
    """The file of an embedding, of a folder or of a run. Raises ValueError for none."""
    path = Path(expanded(str(path)))
    if path.is_file():
        if path.suffix.lower() not in _SUFFIXES:
            raise ValueError(f"embedding {str(path)!r}: expected a file that ends in {', '.join(_SUFFIXES)}")
        return path
    for folder in (path, path / "export"):
        for name in (NAME, "learned_embeds.bin"):
            if (folder / name).is_file():
                return folder / name
        own = sorted((folder / "a1111").glob("*.safetensors"))
        if len(own) == 1:
            return own[0]
        if own:
            raise ValueError(f"embedding {str(path)!r}: holds {[p.name for p in own]}; give one of them")
    if (path / "checkpoints").is_dir() and not (path / "export").is_dir():
        raise ValueError(f"embedding {str(path)!r}: not exported yet; the export is written when training ends")
    raise ValueError(f"embedding {str(path)!r}: no such file, nor a folder that holds {NAME}")


def _open(path: Path) -> tuple[dict[str, Any], str | None]:
    """(tensors or A1111's tree, the name in the header)."""
    if not weights.is_pickled(path):
        source = weights.open_file(path, prefix="embedding ")
        return {k: e.read() for k, e in source.items()}, weights.metadata(path).get("name")
    tree = read_pickled(path)
    if isinstance(tree, Tensor):
        return {"emb_params": tree}, None
    if not isinstance(tree, dict):
        raise ValueError(f"embedding {str(path)!r}: expected names and tensors")
    return {str(k): v for k, v in tree.items()}, None


def _only(rows: Any, where: str) -> Tensor:
    """The vectors of A1111's tree; of the first scripts' ParameterDict what its state holds."""
    if isinstance(rows, Inert):
        rows = (rows.state or {}).get("_parameters", {})
    if not isinstance(rows, dict) or len(rows) != 1:
        raise ValueError(f"{where}: expected one token in string_to_param, got {len(rows) if rows else 0}")
    return _rows(next(iter(rows.values())), where)


def _rows(value: Any, where: str) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim not in (1, 2) or not value.is_floating_point():
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where}: expected vectors, got {shape}")
    if not weights.finite(value):
        raise ValueError(f"{where}: its vectors hold NaN or infinity")
    return value.detach().float().view(-1, value.shape[-1])
