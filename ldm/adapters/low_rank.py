"""Low-rank corrections as tensors: what they add to a weight, merging and taking out again, extraction by SVD.

LoRA: W + (alpha / rank) up down (Hu 2021, arXiv 2106.09685). DoRA: m V / |V| with V that sum and |.| the norm of each
output's row (Liu 2024, arXiv 2402.09353).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.adapters.corrections import Correction, Corrections, axis_norms
from ldm.adapters.sites import Site, all_sites, other_sites
from ldm.models.network import Network
from ldm.models.text import TextEncoder


@dataclass(frozen=True)
class LowRank(Correction):
    """One layer's correction: `down` (r, in[, kh, kw]), `up` (out, r[, 1, 1]), scaled by `alpha` / r.

    `magnitude` makes it DoRA: (out,), or with `axis` 1 (in,).
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    axis: int = 0

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product is multiplied with."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def change(self) -> Tensor:
        return (self.scale * (self.up.double().flatten(1) @ self.down.double().flatten(1))).view(self.shape)


Lora = dict[str, LowRank]
"""Corrections by the names of `sites`."""


def row_norms(weight: Tensor) -> Tensor:
    """Norms (out,) of a weight's rows."""
    return axis_norms(weight)


class Loras:
    """Corrections merged into a model's weights, several at once.

    The weights as they were are kept for every layer that is touched, so that taking out is exact to the last bit.
    """

    def __init__(self, network: Network, text: Sequence[TextEncoder]) -> None:
        self._network = network
        self._sites = all_sites(network, text) | other_sites(network, text)
        self._loaded: dict[str, tuple[Corrections, float]] = {}
        self._before: dict[str, Tensor] = {}

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight of what is merged."""
        return {name: weight for name, (_, weight) in self._loaded.items()}

    def add(self, name: str, lora: Corrections, weight: float = 1.0) -> None:
        """Merge under a name.

        Raises ValueError for layers that the model lacks or has in another shape, and for a name that is taken.
        """
        if name in self._loaded:
            raise ValueError(f"LoRA {name!r}: a LoRA of this name is loaded; give this one another name")
        self._check(name, lora)
        self._loaded[name] = (dict(lora), weight)
        self._refresh(set(lora))

    def set(self, weights: Mapping[str, float]) -> None:
        """Change weights; those not named keep theirs."""
        if unknown := sorted(set(weights) - set(self._loaded)):
            raise ValueError(f"LoRA {unknown}: not loaded; loaded are {sorted(self._loaded)}")
        for name, weight in weights.items():
            self._loaded[name] = (self._loaded[name][0], weight)
        self._refresh({site for name in weights for site in self._loaded[name][0]})

    def remove(self, *names: str) -> None:
        """Take out those named, or all: what was changed by no other is exactly what it was."""
        for name in names or list(self._loaded):
            if name not in self._loaded:
                raise ValueError(f"LoRA {name!r}: not loaded; loaded are {sorted(self._loaded)}")
            self._refresh(set(self._loaded.pop(name)[0]))

    def _check(self, name: str, lora: Corrections) -> None:
        if unknown := sorted(set(lora) - set(self._sites)):
            raise ValueError(f"LoRA {name!r}: {len(unknown)} layers are not in this model, such as {unknown[0]!r}")
        if stored := sorted(site for site in lora if self._sites[site].stored):
            raise ValueError(
                f"LoRA {name!r}: nothing can be merged into {stored[0]}, whose weight is stored as train.engine.frozen "
                "says; load the base model anew"
            )
        for site, low in lora.items():
            shape = tuple(self._sites[site].read().shape)
            if low.shape != shape:
                raise ValueError(
                    f"LoRA {name!r}: {site} has shape {low.shape}, the model's is {shape}: another base model?"
                )

    @torch.no_grad()
    def _refresh(self, names: set[str]) -> None:
        """Compute the weights of these sites anew from what they were."""
        for name in sorted(names):
            site = self._sites[name]
            before = self._before.setdefault(name, site.read().clone())
            own = name.startswith(f"{self._network.component}.")
            device = self._network.runs_on(before) if own else before.device
            here = [(lora[name], weight) for lora, weight in self._loaded.values() if name in lora]
            if here:
                total = base = before.to(device).double()
                for low, weight in here:
                    total = total + weight * low.to(device).delta(base)
                site.read().copy_(total)
            else:
                site.read().copy_(before)
                del self._before[name]


@torch.no_grad()
def extract(
    before: tuple[Network, Sequence[TextEncoder]],
    after: tuple[Network, Sequence[TextEncoder]],
    rank: int,
    names: Sequence[str] | None = None,
) -> Lora:
    """The best correction of a rank from one model to another, layer by layer: the largest singular values.

    Layers that did not change are left out. Raises ValueError when none did, or the models have other layers.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    old, new = all_sites(*before), all_sites(*after)
    shapes = [{name: tuple(site.read().shape) for name, site in sites.items()} for sites in (old, new)]
    if odd := sorted(name for name in {**old, **new} if shapes[0].get(name) != shapes[1].get(name)):
        raise ValueError(f"the two models are of different form: {odd[0]} differs, and {len(odd) - 1} others")
    found: Lora = {}
    for name in names if names is not None else old:
        weight = old[name].read()
        delta = new[name].read().double() - weight.double()
        if not delta.any():
            continue
        found[name] = nearest(delta, rank)[0]
    if not found:
        raise ValueError("the two models have the same weights: nothing to extract")
    return found


def nearest(delta: Tensor, rank: int) -> tuple[LowRank, float]:
    """The best product of a rank for a change (out, in[, kh, kw]) by its largest singular values; the error."""
    u, s, v = torch.linalg.svd(delta.double().flatten(1), full_matrices=False)
    r = min(rank, len(s))
    root = s[:r].sqrt()
    up = (u[:, :r] * root).float().view(-1, r, *[1] * (delta.ndim - 2))
    down = (root[:, None] * v[:r]).float().view(r, *delta.shape[1:])
    total = float(s.norm())
    return LowRank(down.contiguous(), up.contiguous(), float(r)), float(s[r:].norm()) / total if total else 0.0


@torch.no_grad()
def as_plain(lora: Corrections, sites: Mapping[str, Site], rank: int) -> tuple[Lora, dict[str, tuple[float, float]]]:
    """The same corrections as plain low-rank products, those of another kind at most of `rank`.

    Also the norms of each one's error and of the whole change.

    Raises KeyError for a layer that `sites` lacks; vectors have no such form and must not be among them.
    """
    found: Lora = {}
    errors: dict[str, tuple[float, float]] = {}
    for name, low in lora.items():
        if isinstance(low, LowRank) and low.magnitude is None:
            found[name] = low
        else:
            base = sites[name].read()
            delta = low.to(base.device).delta(base)
            found[name], error = nearest(delta, rank)
            errors[name] = (error * float(delta.norm()), float(delta.norm()))
    return found, errors
