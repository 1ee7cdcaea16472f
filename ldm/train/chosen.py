"""Whole weights of a run's checkpoint by choice: as trained, averaged, or averaged to a width chosen afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ldm.checkpoint import files
from ldm.train import posthoc
from ldm.train.ema import decay_name, power_name
from ldm.train.state import Shards, read_weights


@dataclass(frozen=True)
class Chosen:
    """Weights by their names below `trained`, the step they are of, and what they are in words."""

    weights: dict[str, Tensor]
    step: int
    what: str


def choose(run: Path, step: int | None = None, ema: str = "ema") -> Chosen:
    """Weights of checkpoint `step` (None: the newest whole one) of a run folder, which may be in training.

    `ema`: "raw", "ema" (the main average), a decay that was kept, or a relative width, which is reconstructed from the
    snapshots of power-function averages up to that step. Raises ValueError when there is no such thing.
    """
    for _ in range(3):
        try:
            return _choose(run, step, ema)
        except FileNotFoundError:  # a run in training removed it meanwhile
            continue
    raise ValueError(f"run {str(run)!r}: its checkpoints vanish faster than they can be read; raise checkpoint.keep")


def _choose(run: Path, step: int | None, ema: str) -> Chosen:
    root = run / "checkpoints" if step is None else files.kept(run, step)
    if not files.steps(root):
        raise ValueError(f"run {str(run)!r}: no checkpoint in it")
    if step is not None:
        if step not in files.steps(root):
            raise ValueError(f"step: {step} is not one of {files.steps(root)}")
        folder = root / f"step-{step}"
        problem = files.damage(folder)
        if problem is not None:
            raise ValueError(f"checkpoint {folder} is damaged: {problem}")
    else:
        newest = files.newest(root)
        if newest is None:
            raise ValueError(f"run {str(run)!r}: every checkpoint is damaged")
        folder = newest
    at = files.step_of(folder)
    kind, width = _kind(folder, ema)
    if width is None:
        found, what = read_weights(folder, kind), {"w": "as trained", "ema": "averaged"}.get(kind, f"average {ema}")
    else:
        found, misfit = posthoc.reconstruct(posthoc.snapshots(run, at), width, at)
        what = f"averaged to the relative width {width:g} from snapshots (misfit of the profile {misfit:.1e})"
    return Chosen({n.removeprefix("trained."): t for n, t in found.items()}, at, what)


def _kind(folder: Path, ema: str) -> tuple[str, float | None]:
    """The stored kind, or a width to reconstruct."""
    if ema in ("raw", "ema"):
        return ("w" if ema == "raw" else "ema"), None
    try:
        value = float(ema)
    except ValueError:
        raise ValueError(f"ema: {ema!r} is not raw, ema, a decay or a relative width") from None
    shards = Shards(folder)
    for kind in (decay_name(value), power_name(value)):
        if shards.has(kind):
            return kind, None
    if value > posthoc.WIDEST:
        kept = [k.split(".", 2)[2] for k in shards.kinds() if k.startswith("ema.")]
        raise ValueError(f"ema: no average of decay {value} was kept in {folder}; it has {['raw', 'ema', *kept]}")
    return "", value
