"""The portable checkpoint: each rank writes its fragments of masters, moments and EMA; any world and stage reads them.

Tensor names are `KIND:PARAMETER@OFFSET` with KIND `w` (master), `ema`, or `s.NAME` (optimizer state NAME).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm import dist
from ldm.checkpoint import files
from ldm.train.ema import Ema
from ldm.train.engine import Engine, Fragment


def _optimizer_kinds(engine: Engine) -> list[str]:
    """Names of optimizer state that has one value a weight, the same on all ranks."""
    kinds: set[str] = set()
    for master in engine.masters:
        for name, value in engine.inner.state.get(master, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape == master.shape:
                kinds.add(name)
    return sorted(kinds)


def _piece(engine: Engine, f: Fragment, value: Tensor) -> Tensor:
    flat = value.detach().reshape(-1)
    return flat if engine.config.zero_stage == 0 else flat[f.offset : f.offset + f.length]


def _mine(engine: Engine) -> Iterator[Fragment]:
    """Fragments that this rank writes; replicated ones (stage 0) are spread over the ranks."""
    for i, f in enumerate(engine.fragments):
        if engine.config.zero_stage != 0 or i % dist.world_size() == dist.rank():
            yield f


def _shard(engine: Engine, ema: Ema | None, kinds: list[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    masters, state = engine.masters, engine.inner.state
    for f in _mine(engine):
        where = f"{f.name}@{f.start}"
        tensors[f"w:{where}"] = _piece(engine, f, masters[f.flat])
        for kind in kinds:
            tensors[f"s.{kind}:{where}"] = _piece(engine, f, state[masters[f.flat]][kind])
        if ema is not None:
            tensors[f"ema:{where}"] = _piece(engine, f, ema.shards[f.flat])
    return {name: t.to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def _optimizer_step(engine: Engine) -> float | None:
    for master in engine.masters:
        if "step" in (state := engine.inner.state.get(master, {})):
            return float(state["step"])
    return None


def save(
    root: Path,
    step: int,
    engine: Engine,
    ema: Ema | None,
    extra: dict[str, Any],
    keep: int,
    guard: Callable[[], None] = lambda: None,
) -> Path:
    """Write and publish `step-N`; collective. `extra` is JSON values and, under "tensors", named tensors.

    Rank 0 calls `guard` right before it publishes: what it raises keeps the checkpoint absent.
    """
    beside = files.staging(root, step)
    if dist.rank() == 0:
        beside.mkdir(parents=True, exist_ok=True)
        for old in beside.iterdir():
            old.unlink()
    dist.barrier()
    kinds = _optimizer_kinds(engine)
    name = f"shard-{dist.rank():05d}.safetensors"
    save_file(_shard(engine, ema, kinds), beside / name)
    files.write_text(beside / f"{name}.json", json.dumps({name: files.describe(beside / name)}))
    if dist.rank() == 0:
        shapes = {
            n: list(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters() if p.requires_grad
        }
        tensors = extra.pop("tensors", {})
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, beside / "objective.safetensors")
        meta = {
            "step": step,
            "kinds": kinds,
            "optimizer_step": _optimizer_step(engine),
            "shapes": shapes,
            "extra": extra,
        }
        files.write_text(beside / "state.json", json.dumps(meta, indent=1))
    dist.barrier()
    if dist.rank() == 0:
        listing: dict[str, dict[str, object]] = {}
        for note in sorted(beside.glob("shard-*.safetensors.json")):
            listing |= json.loads(note.read_text())
            note.unlink()
        for own in ("objective.safetensors", "state.json"):
            listing[own] = files.describe(beside / own)
        guard()
        files.publish(root, step, listing, keep)
    dist.barrier()
    return root / f"step-{step}"


class _Shards:
    """All fragments in a checkpoint folder, found by (kind, parameter)."""

    def __init__(self, folder: Path) -> None:
        self._index: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            handle = safe_open(path, "pt")
            for entry in handle.keys():  # noqa: SIM118 (not a dict)
                kind, _, rest = entry.partition(":")
                name, _, start = rest.rpartition("@")
                piece = handle.get_slice(entry)
                self._index.setdefault((kind, name), []).append((int(start), piece.get_shape()[0], piece))

    def has(self, kind: str) -> bool:
        return any(k == kind for k, _ in self._index)

    def names(self) -> list[str]:
        return sorted({n for k, n in self._index if k == "w"})

    def fill(self, kind: str, name: str, start: int, into: Tensor) -> None:
        """Copy `[start, start + len(into))` of a parameter into `into`."""
        done = 0
        for first, length, piece in self._index.get((kind, name), []):
            low, high = max(first, start), min(first + length, start + into.numel())
            if low < high:
                into[low - start : high - start].copy_(piece[low - first : high - first])
                done += high - low
        if done != into.numel():
            raise ValueError(f"checkpoint: {kind} of {name} has {done} of {into.numel()} values at {start}")


@torch.no_grad()
def load(folder: Path, engine: Engine, ema: Ema | None) -> tuple[int, dict[str, Any]]:
    """Fill engine and EMA from a checkpoint of any world size and stage; (step, extra). Collective.

    Raises ValueError when the trained parameters or their shapes are not the same.
    """
    meta = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    want = engine.shapes()
    if want != meta["shapes"]:
        odd = sorted(n for n in set(want) | set(meta["shapes"]) if want.get(n) != meta["shapes"].get(n))
        raise ValueError(f"checkpoint {folder}: made for another model; {len(odd)} parameters differ, first {odd[:3]}")
    shards, masters, state = _Shards(folder), engine.masters, engine.inner.state
    if meta["optimizer_step"] is not None:
        for master in masters:
            count = torch.tensor(meta["optimizer_step"], dtype=torch.float32)
            state[master] = {"step": count, **{k: torch.zeros_like(master) for k in meta["kinds"]}}
    for f in engine.fragments:
        master = masters[f.flat]
        shards.fill("w", f.name, f.start, _piece(engine, f, master))
        if meta["optimizer_step"] is not None:
            for kind in meta["kinds"]:
                shards.fill(f"s.{kind}", f.name, f.start, _piece(engine, f, state[master][kind]))
        if ema is not None:
            shards.fill("ema" if shards.has("ema") else "w", f.name, f.start, _piece(engine, f, ema.shards[f.flat]))
    engine.push()
    extra = dict(meta["extra"])
    with safe_open(folder / "objective.safetensors", "pt") as handle:
        extra["tensors"] = {k: handle.get_tensor(k) for k in handle.keys()}  # noqa: SIM118 (not a dict)
    return int(meta["step"]), extra


def read_weights(folder: Path, kind: str = "ema") -> dict[str, Tensor]:
    """Whole float32 weights of a checkpoint, without an engine; `kind` is `ema` (if there is one) or `w`."""
    meta = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    shards = _Shards(folder)
    kind = kind if shards.has(kind) else "w"
    weights = {}
    for name, shape in meta["shapes"].items():
        flat = torch.empty(torch.Size(shape).numel(), dtype=torch.float32)
        shards.fill(kind, name, 0, flat)
        weights[name] = flat.view(shape)
    return weights
