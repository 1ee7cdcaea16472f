"""The portable checkpoint: each rank writes its fragments of masters, moments and EMA; any world and stage reads them.

Tensor names are `KIND:PARAMETER@OFFSET` with KIND `w` (master), `s.NAME` (optimizer state NAME), `ema` (the main
average) or that of another average (`ldm.train.ema`), and `x`: of schedule-free training, whose masters are not the
weights to use, those that are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm import dist
from ldm.checkpoint import files
from ldm.train import packages
from ldm.train.ema import Ema
from ldm.train.engine import Engine
from ldm.train.fragments import Fragment
from ldm.train.optim import kinds_of
from ldm.train.optim import read_state as read_state_of
from ldm.train.optim import write_state as write_state_of


@dataclass
class Held:
    """What one rank writes of a checkpoint, in host memory; `meta` and `objective` on rank 0 alone."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict[str, Any] | None
    objective: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(t.numel() * t.element_size() for t in (*self.tensors.values(), *self.objective.values()))


def _piece(engine: Engine, f: Fragment, value: Tensor) -> Tensor:
    flat = value.detach().reshape(-1)
    return flat if engine.config.zero_stage == 0 else flat[f.offset : f.offset + f.length]


def _mine(engine: Engine) -> Iterator[Fragment]:
    """Fragments that this rank writes; replicated ones (stage 0) are spread over the ranks."""
    for i, f in enumerate(engine.fragments):
        if engine.config.zero_stage != 0 or i % dist.world_size() == dist.rank():
            yield f


def _optimizer_step(engine: Engine) -> float | None:
    for master in engine.masters:
        if "step" in (state := engine.inner.state.get(master, {})):
            return float(state["step"])
    return None


def hold(
    step: int, engine: Engine, ema: Ema | None, extra: dict[str, Any], record: dict[str, Any] | None = None
) -> Held:
    """Copy this rank's part of a checkpoint to host memory: the only part that training waits for.

    `extra` is JSON values and, under "tensors", named tensors; `record` what the run is trained with.
    """
    averages, masters = {} if ema is None else dict(ema.averages), engine.masters
    if packages.is_schedule_free(engine.inner):
        averages["x"] = engine.weights_to_use()
    states = [read_state_of(engine.inner, master) for master in masters]
    tensors: dict[str, Tensor] = {}
    for f in _mine(engine):
        where = f"{f.name}@{f.start}"
        tensors[f"w:{where}"] = _piece(engine, f, masters[f.flat])
        for kind, value in states[f.flat].items():
            tensors[f"s.{kind}:{where}"] = _piece(engine, f, value)
        for kind, shards in averages.items():
            tensors[f"{kind}:{where}"] = _piece(engine, f, shards[f.flat])
    own = extra.pop("tensors", {})
    meta = {
        "step": step,
        "optimizer": type(engine.inner).__name__,
        "kinds": sorted({kind for state in states for kind in state}),
        "optimizer_step": _optimizer_step(engine),
        "optimizer_groups": packages.group_numbers(engine.inner),
        "averages": [] if ema is None else list(ema.averages),
        "power": [] if ema is None else list(ema.config.power),
        "shapes": engine.shapes(),
        "extra": extra,
        "trained_with": record,
    }
    first = dist.rank() == 0
    return Held(step, _on_host(tensors), meta if first else None, _on_host(own) if first else {})


def hold_snapshot(step: int, engine: Engine, ema: Ema) -> Held:
    """The power-function averages alone, for `ldm.train.posthoc`; in half precision if so configured."""
    dtype = torch.float16 if ema.config.half_snapshots else torch.float32
    tensors = {
        f"{kind}:{f.name}@{f.start}": _piece(engine, f, shards[f.flat]).to(dtype)
        for f in _mine(engine)
        for kind, shards in ema.powers.items()
    }
    meta = {"step": step, "averages": list(ema.powers), "power": list(ema.config.power), "shapes": engine.shapes()}
    return Held(step, _on_host(tensors), meta if dist.rank() == 0 else None, {})


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def prepare(root: Path, step: int) -> Path:
    """An empty staging folder; on rank 0, before any rank writes."""
    beside = files.staging(root, step)
    beside.mkdir(parents=True, exist_ok=True)
    for old in beside.iterdir():
        old.unlink()
    return beside


def write(held: Held, beside: Path) -> None:
    """Write and sync this rank's files into the staging folder; not collective, safe in a thread."""
    name = f"shard-{dist.rank():05d}.safetensors"
    save_file(held.tensors, beside / name)
    files.write_text(beside / f"{name}.json", json.dumps({name: files.describe(beside / name)}))
    if held.meta is not None:
        save_file(held.objective, beside / "objective.safetensors")
        files.write_text(beside / "state.json", json.dumps(held.meta, indent=1))


def publish(root: Path, step: int, keep: int, keep_every: int, guard: Callable[[], None]) -> Path:
    """Give the staged checkpoint its name, once all ranks have written; on rank 0 alone.

    What `guard`, called right before, raises keeps the checkpoint absent.
    """
    beside = files.staging(root, step)
    listing: dict[str, dict[str, object]] = {}
    notes = sorted(beside.glob("shard-*.safetensors.json"))
    for note in notes:
        listing |= json.loads(note.read_text())
    for own in ("objective.safetensors", "state.json"):
        listing[own] = files.describe(beside / own)
    for note in notes:
        note.unlink()
    guard()
    return files.publish(root, step, listing, keep, keep_every)


def save(
    root: Path,
    step: int,
    engine: Engine,
    ema: Ema | None,
    extra: dict[str, Any],
    keep: int,
    guard: Callable[[], None] = lambda: None,
) -> Path:
    """Hold, write and publish `step-N` while training waits; collective."""
    held = hold(step, engine, ema, extra)
    if dist.rank() == 0:
        prepare(root, step)
    dist.barrier()
    write(held, files.staging(root, step))
    dist.barrier()
    if dist.rank() == 0:
        publish(root, step, keep, 0, guard)
    dist.barrier()
    return root / f"step-{step}"


class Shards:
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

    def kinds(self) -> list[str]:
        """Of tensors there are."""
        return sorted({k for k, _ in self._index})

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


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint's `state.json` says."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


@torch.no_grad()
def load(folder: Path, engine: Engine, ema: Ema | None, *, anew: bool = False) -> tuple[int, dict[str, Any]]:
    """Fill engine and EMA from a checkpoint of any world size and stage; (step, extra). Collective.

    An average that it does not have begins at the main one, or at the weights. With `anew` another optimizer begins
    without state. Raises ValueError when the trained parameters or their shapes are not the same.
    """
    meta, want = read_state(folder), engine.shapes()
    if want != meta["shapes"]:
        raise ValueError(f"checkpoint {folder}: made for another model; {_odd(want, meta['shapes'])}")
    own = type(engine.inner).__name__
    other = meta.get("optimizer", own) != own
    if other and not anew:
        raise ValueError(f"train.optim.algorithm: checkpoint {folder} has the state of {meta['optimizer']}, not {own}")
    shards, masters = Shards(folder), engine.masters
    kinds = [[] if other else kinds_of(engine.inner, master, meta["kinds"]) for master in masters]
    states = [
        {k: master.new_zeros(packages.shape_of(k, master.shape)) for k in each}
        for master, each in zip(masters, kinds, strict=True)
    ]
    origins = {} if ema is None else {kind: _origin(shards, kind) for kind in ema.averages}
    for f in engine.fragments:
        master = masters[f.flat]
        shards.fill("w", f.name, f.start, _piece(engine, f, master))
        for kind, value in states[f.flat].items():
            shards.fill(f"s.{kind}", f.name, f.start, _piece(engine, f, value))
        for kind, origin in origins.items():
            assert ema is not None
            shards.fill(origin, f.name, f.start, _piece(engine, f, ema.averages[kind][f.flat]))
    for master, values in zip(masters, states if not other else [], strict=not other):
        write_state_of(engine.inner, master, values, meta["optimizer_step"])
    if not other:
        packages.set_group_numbers(engine.inner, meta.get("optimizer_groups", []))
    engine.push()
    extra = dict(meta["extra"])
    with safe_open(folder / "objective.safetensors", "pt") as handle:
        extra["tensors"] = {k: handle.get_tensor(k) for k in handle.keys()}  # noqa: SIM118 (not a dict)
    return int(meta["step"]), extra


def _odd(want: dict[str, list[int]], have: dict[str, list[int]]) -> str:
    """How the trained parameters differ, by an example."""
    odd = sorted(n for n in {*want, *have} if want.get(n) != have.get(n))
    name = next((n for n in odd if n in want and n in have), odd[0])
    shapes = [tuple(s[name]) if name in s else "absent" for s in (have, want)]
    total = len({*want, *have})
    return f"{len(odd)} of {total} parameters differ, such as {name}: {shapes[0]} there, {shapes[1]} here"


def _origin(shards: Shards, kind: str) -> str:
    """What an average is filled from."""
    if shards.has(kind):
        return kind
    dist.say(f"the checkpoint has no average {kind!r}: it begins at {'ema' if shards.has('ema') else 'the weights'}")
    return "ema" if shards.has("ema") else "w"


def read_weights(folder: Path, kind: str = "ema") -> dict[str, Tensor]:
    """Whole float32 weights of a checkpoint, without an engine; `kind` is `ema` (if there is one), `w` or another's.

    Of schedule-free training `w` are the averages, which are the weights to use. Raises ValueError when there is no
    average of that kind.
    """
    shards = Shards(folder)
    if kind == "ema" and not shards.has(kind):
        kind = "w"
    if kind == "w" and shards.has("x"):
        kind = "x"
    if not shards.has(kind):
        averages = [k for k in shards.kinds() if k.startswith("ema")]
        raise ValueError(f"checkpoint {folder}: no {kind!r}; it has {['w', *averages]}")
    weights = {}
    for name, shape in read_state(folder)["shapes"].items():
        flat = torch.empty(torch.Size(shape).numel(), dtype=torch.float32)
        shards.fill(kind, name, 0, flat)
        weights[name] = flat.view(shape)
    return weights
