"""The record of what a run is trained with: its config, and hashes of its data and of the models it begins with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm import dist
from ldm.checkpoint import files
from ldm.checkpoint.folder import NETWORKS
from ldm.config.load import decode
from ldm.data.fingerprint import fingerprint
from ldm.data.loader import DataConfig
from ldm.data.manifest import Manifest, resolve
from ldm.models.shipped import SHIPPED, named, text_home
from ldm.models.text import openclip
from ldm.train.changes import Record
from ldm.words import near

_TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "text_encoder_3", "tokenizer_3")
PARTS = {"vae": ("vae",), "text": ("clip", *_TEXT)}
"""Of a model's folder, what the keys `task.vae` and `task.text` take."""
MODELS = ("vae", "text", "start", "base", "teacher", "image_encoder")
"""Keys of tasks that name a model."""
_WHOLE = (*NETWORKS, "vae", "scheduler", *PARTS["text"])
_FILES = (".safetensors", ".json", ".txt", ".bin", ".ckpt", ".model")
_BOOKKEEPING = ("_name_or_path", "_diffusers_version", "transformers_version")


def make(resolved: str) -> Record:
    """The record of a config as YAML; on rank 0 alone, as models are read whole.

    Data that the recipe has yet to write is None in it. Raises ValueError for data or a model that is not there.
    """
    tree = OmegaConf.to_container(OmegaConf.create(resolved), resolve=False)
    config: dict[str, Any] = tree if isinstance(tree, dict) else {}  # type: ignore[assignment]
    task = config.get("task") or {}
    content = {
        "data": data_content(config),
        "models": {name: _model(name, task[name]) for name in MODELS if name in task},
    }
    return {"config": config, "content": content, "ranks": dist.world_size()}


def data_content(config: dict[str, Any]) -> list[dict[str, Any] | None]:
    """Of each data set, a hash of the samples in their order (not of the names of files) and how many they are.

    None where pictures are yet to be written as shards.
    """
    data, task = config.get("data"), config.get("task") or {}
    if not data:
        return []
    written = writes_data(task)
    sources = [s["data"] for s in data["sources"]] if "sources" in data else [data]
    return [_data(decode(DataConfig, source, "data"), written) for source in sources]


def writes_data(task: dict[str, Any]) -> bool:
    """Whether a recipe writes the pictures of a folder as shards, at `data.path`."""
    return bool(task.get("images") or task.get("concepts"))


def _data(config: DataConfig, written: bool) -> dict[str, Any] | None:
    if written and not (Path(config.path) / "manifest.json").is_file():
        return None
    manifest = Manifest.read(resolve(config.path), config.remote)
    told = [fingerprint(manifest, config.split, config.remote), manifest.cached]
    return {"hash": _hash(json.dumps(told, sort_keys=True).encode()), "samples": manifest.samples(config.split)}


def _model(name: str, source: str | None) -> str | None:
    if source is not None and source.startswith(openclip.PREFIX):
        return source
    try:
        return None if source is None else model_hash(source, PARTS.get(name))
    except ValueError as error:
        raise ValueError(f"task.{name}: {error}") from error


def model_hash(source: str, parts: tuple[str, ...] | None = None) -> str:
    """A hash of a model's weights and settings, whatever its place; of some parts of its folder alone.

    Of a model that is in the hub alone, its name. Raises ValueError when it cannot be anywhere.
    """
    place = _place(source)
    if place is None:
        return source
    total, found = hashlib.sha256(), list(_files_of(place, parts))
    size = sum(path.stat().st_size for _, path in found) / 2**30
    if size > 1:
        dist.say(f"reading {source!r} ({size:.1f} GiB), to know it again")
    for name, path in found:
        total.update(f"{name} {_file_hash(path)}\n".encode())
    adapter = place / "adapter.json"
    if parts is None and adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base")
        total.update(f"base {model_hash(base)}\n".encode() if base != source else b"")
    return total.hexdigest()[:32]


def _place(source: str) -> Path | None:
    found = named(source)
    if (found / "export").is_dir():
        return found / "export"
    if found.exists():
        return found
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        known = f"not a shipped model ({', '.join(SHIPPED)}) and no such folder or file"
        raise ValueError(f"model {source!r}: {known}{near(source, SHIPPED)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except (OSError, ValueError):  # the hub's errors are of these
        return None


def _files_of(place: Path, parts: tuple[str, ...] | None) -> Iterator[tuple[str, Path]]:
    """What decides a model, by names within its folder."""
    if place.is_file():
        yield "", place
        return
    names = _WHOLE if parts is None else parts
    homes = [(text_home(place) if name in _TEXT else place) / name for name in names]
    inside = [home for home in homes if home.is_dir()]
    for root in inside or [place]:  # the latter an adapter's or a module's own folder
        for path in sorted(root.iterdir()):
            if path.is_file() and path.suffix in _FILES and path.name not in ("adapter.json", "trained.json"):
                yield str(path.relative_to(root.parent if inside else place)), path


def _file_hash(path: Path) -> str:
    if path.suffix == ".json":
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return files.digest(path)
        if isinstance(tree, dict):
            kept = {k: v for k, v in tree.items() if k not in _BOOKKEEPING}
            return _hash(json.dumps(kept, sort_keys=True).encode())
    return files.digest(path)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
