"""An average of any width after the run, from snapshots of power-function averages (Karras et al., arXiv 2312.02696).

Each snapshot weights the run's past weights by p(s) = (gamma + 1) s^gamma / t^(gamma + 1) on [0, t]. The wanted profile
is the combination of theirs that is nearest in the least-squares sense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoint import files
from ldm.train.ema import WIDEST, gamma_of, power_name
from ldm.train.state import Shards, read_state


@dataclass(frozen=True)
class Profile:
    """A power-function average after `step` optimizer steps."""

    step: int
    gamma: float


def overlap(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles (appendix C of the paper)."""
    least = min(a.step, b.step)
    ratio = (least / a.step) ** (a.gamma + 1) * (least / b.step) ** (b.gamma + 1)
    return (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1) * ratio / least


def coefficients(have: Sequence[Profile], want: Profile) -> np.ndarray:
    """The factors (N,) float64 of the combination of `have` nearest to `want`."""
    gram = np.array([[overlap(a, b) for b in have] for a in have])
    scale = 1 / np.sqrt(np.diag(gram))  # profiles of unit length: early ones are high and narrow
    right = np.array([overlap(a, want) for a in have])
    found, *_ = np.linalg.lstsq(gram * scale[:, None] * scale, right * scale, rcond=1e-12)
    return found * scale


def misfit(have: Sequence[Profile], want: Profile) -> float:
    """The distance of the best combination's profile from the wanted one, relative to the latter's length."""
    x = coefficients(have, want)
    gram = np.array([[overlap(a, b) for b in have] for a in have])
    own = overlap(want, want)
    square = own - 2 * x @ np.array([overlap(a, want) for a in have]) + x @ gram @ x
    return float(np.sqrt(max(square, 0.0) / own))


@dataclass(frozen=True)
class Snapshot:
    """One stored average: the folder it is in, its kind there, its profile."""

    folder: Path
    kind: str
    profile: Profile


def snapshots(run: Path, upto: int | None = None) -> list[Snapshot]:
    """What a run has stored in `ema` and in its checkpoints, up to a step, oldest first; no damaged folders."""
    folders: dict[int, Path] = {}
    for root in (run / "checkpoints", run / "ema"):
        folders |= {s: root / f"step-{s}" for s in files.steps(root) if upto is None or s <= upto}
    found = []
    for step, folder in sorted(folders.items()):
        if files.damage(folder) is not None:
            continue
        for width in read_state(folder).get("power", []):
            found.append(Snapshot(folder, power_name(width), Profile(step, gamma_of(width))))
    return found


def reconstruct(have: Sequence[Snapshot], width: float, step: int | None = None) -> tuple[dict[str, Tensor], float]:
    """Whole float32 weights of the power-function average of relative width `width` after `step` (None: the last
    stored), and the misfit of its profile.

    Parameters are combined one after the other in float64. Raises ValueError for a width out of range, or without
    snapshots.
    """
    if not 0 < width < WIDEST:
        raise ValueError(f"a relative width must be in (0, {WIDEST:.4f}), got {width}")
    if not have:
        raise ValueError("no snapshots of power-function averages; train with train.ema.power=[0.05,0.1]")
    last = max(s.profile.step for s in have)
    want = Profile(last if step is None else step, gamma_of(width))
    profiles = [s.profile for s in have]
    factors = coefficients(profiles, want)
    opened = {s.folder: Shards(s.folder) for s in have}
    weights = {}
    for name, shape in read_state(have[-1].folder)["shapes"].items():
        total = torch.zeros(torch.Size(shape).numel(), dtype=torch.float64)
        part = torch.empty(total.shape, dtype=torch.float32)
        for snapshot, factor in zip(have, factors, strict=True):
            opened[snapshot.folder].fill(snapshot.kind, name, 0, part)
            total += float(factor) * part.double()
        weights[name] = total.float().view(shape)
    return weights, misfit(profiles, want)
