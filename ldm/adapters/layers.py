"""Modules that correct one layer's output while they train: LoRA, LoHa, LoKr, OFT; each starts as no correction.

Legend: r rank, N leading axes of a layer's input.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.corrections import Correction, Hadamard, Kronecker, Rotation, turned
from ldm.adapters.lora_config import LoraConfig
from ldm.adapters.low_rank import LowRank, row_norms
from ldm.adapters.sites import Site
from ldm.models.network import Network


class Layer(nn.Module, ABC):
    """One layer's correction. `forward(x, out)` corrects the layer's output."""

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__()
        self.rank = config.rank_of(site.name)
        self.scale = config.alpha_of(site.name) / self.rank
        self.dropout, self.max_norm = config.dropout, config.max_norm
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self._site, self._config = site, config  # the site's weights are not this module's
        self._conv: dict[str, Any] = {}
        if (conv := site.conv) is not None:
            if conv.groups != 1 or conv.padding_mode != "zeros":
                raise ValueError(f"targets: {site.name} is a grouped or wrapped convolution, which LoRA does not cover")
            self._conv = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}

    @abstractmethod
    def forward(self, x: Tensor, out: Tensor) -> Tensor: ...

    @abstractmethod
    def correction(self, parts: Mapping[str, Tensor]) -> Correction:
        """What weights of this layer, by name, are."""

    @abstractmethod
    def parts(self, given: Correction) -> dict[str, Tensor | None]:
        """The other way round. Raises ValueError for a correction that this layer cannot hold."""

    @property
    def dropping(self) -> bool:
        """Whether something is dropped now."""
        return self.training and torch.is_grad_enabled()

    def dropped(self, x: Tensor) -> Tensor:
        """The layer's input."""
        return F.dropout(x, self.dropout) if self.dropout and self.dropping else x

    def kept(self, added: Tensor) -> Tensor:
        """What is added, or nothing of it: multiplied, so that there are gradients on every rank."""
        if not (self.module_dropout and self.dropping):
            return added
        return added * (torch.rand((), device=added.device) >= self.module_dropout).to(added.dtype)

    def thinned(self, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        """With entries of `shape`, which is broadcast, set to zero and the others scaled up."""
        if not (self.rank_dropout and self.dropping):
            return value
        return value * F.dropout(torch.ones(shape, dtype=value.dtype, device=value.device), self.rank_dropout)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer with another weight, without bias."""
        return F.conv2d(x, weight, **self._conv) if self._conv else F.linear(x, weight)

    def magnified(self, out: Tensor, added: Tensor, magnitude: Tensor, change: Tensor, scale: float) -> Tensor:
        """m / |V| times the sum of both, without the bias; the norm is a constant of the gradient (section 4.3)."""
        with torch.no_grad():
            base = self._site.read().float()
            norms = row_norms(base + scale * change.view(base.shape))
        ratio, bias = magnitude / norms, self._site.read_bias()
        shape = (-1, 1, 1) if self._conv else (-1,)
        ratio = ratio.view(shape).to(out.dtype)
        if bias is None:
            return ratio * torch.add(out, added, alpha=scale)
        bias = bias.view(shape).to(out.dtype)
        return ratio * torch.add(out - bias, added, alpha=scale) + bias

    def _refuse(self, given: Correction) -> ValueError:
        kind = type(given).__name__
        return ValueError(f"{self._site.name} is a {kind} there, which this algo does not go on from")


class Low(Layer):
    """LoRA (Hu 2021, arXiv 2106.09685), or DoRA with a magnitude (Liu 2024, arXiv 2402.09353); `up` starts as zero."""

    def __init__(self, site: Site, config: LoraConfig, network: Network) -> None:
        super().__init__(site, config)
        weight = site.read()
        out, ones, device = weight.shape[0], [1] * (weight.ndim - 2), network.runs_on(weight)
        self.down = nn.Parameter(torch.empty(self.rank, *weight.shape[1:], device=device))
        self.up = nn.Parameter(torch.zeros(out, self.rank, *ones, device=device))
        self.magnitude = nn.Parameter(row_norms(weight.to(device).float())) if config.dora else None
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        x = self.dropped(x)
        if self.dropping and (self.rank_dropout or self.module_dropout):
            return self._regularised(x, out)
        up = self._bounded()
        if self._conv:
            added = F.conv2d(F.conv2d(x, self.down, **self._conv), up)
        elif self.magnitude is None:  # one product that adds, with the scale on its small side in the backward too
            small = F.linear(x, self.down).flatten(0, -2)
            return torch.addmm(out.flatten(0, -2), small, up.t(), alpha=self.scale).view(out.shape)
        else:
            added = F.linear(F.linear(x, self.down), up)
        return self._sum(out, added, up)

    def _sum(self, out: Tensor, added: Tensor, up: Tensor) -> Tensor:
        if self.magnitude is None:
            return torch.add(out, added, alpha=self.scale)
        with torch.no_grad():
            change = up.flatten(1) @ self.down.flatten(1)
        return self.magnified(out, added, self.magnitude, change, self.scale)

    def _regularised(self, x: Tensor, out: Tensor) -> Tensor:
        """Ranks are dropped by sample, as kohya's scripts do it."""
        up, small = self._bounded(), self.apply_weight(x, self.down)
        if self._conv:
            small = self.thinned(small, (len(small), self.rank, 1, 1))
            return self._sum(out, self.kept(F.conv2d(small, up)), up)
        small = self.thinned(small, (len(small), *[1] * (small.ndim - 2), self.rank))
        return self._sum(out, self.kept(F.linear(small, up)), up)

    def _bounded(self) -> Tensor:
        """`up`, shortened where the scaled product is longer than `max_norm`."""
        return self.up * bound(self.max_norm, _norm(self.down, self.up, self.scale)) if self.max_norm else self.up

    def correction(self, parts: Mapping[str, Tensor]) -> LowRank:
        return low_rank(parts, self._site.name, self._config)

    def parts(self, given: Correction) -> dict[str, Tensor | None]:
        name = self._site.name
        if not isinstance(given, LowRank) or given.axis != 0:
            raise ValueError(f"{name} is no low-rank product, or its magnitudes are by column: nothing to go on from")
        if given.rank != self.rank:
            raise ValueError(f"rank {given.rank} of {name} is not the configured rank {self.rank}")
        if (given.magnitude is None) != (self.magnitude is None):
            raise ValueError(f"{name}: one of both is DoRA; dora is {self.magnitude is not None}")
        return {"down": given.down, "up": given.up * (given.scale / self.scale), "magnitude": given.magnitude}


class Changed(Layer):
    """A correction whose change of the weight is made as a whole."""

    magnitude: nn.Parameter | None

    def __init__(self, site: Site, config: LoraConfig, network: Network) -> None:
        super().__init__(site, config)
        weight = site.read()
        self.form, self.device = tuple(weight.shape), network.runs_on(weight)
        self.magnitude = nn.Parameter(row_norms(weight.to(self.device).float())) if config.dora else None

    @abstractmethod
    def change(self) -> Tensor:
        """The unscaled change of the weight, of its shape."""

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        change = self.change()
        if self.max_norm:
            change = change * bound(self.max_norm, self.scale * change.norm())
        change = self.thinned(change, (len(change), *[1] * (change.ndim - 1)))
        added = self.kept(self.apply_weight(self.dropped(x), change))
        if self.magnitude is None:
            return torch.add(out, added, alpha=self.scale)
        return self.magnified(out, added, self.magnitude, change.detach(), self.scale)

    def new(self, *shape: int, std: float | None = None) -> nn.Parameter:
        """Weights that start as normal with a deviation, without as LyCORIS' uniform ones; of 0 as zeros."""
        value = torch.empty(shape, device=self.device)
        if std is None:
            nn.init.kaiming_uniform_(value, a=math.sqrt(5))
        else:
            nn.init.normal_(value, std=std) if std else nn.init.zeros_(value)
        return nn.Parameter(value)

    def within(self, correction: Hadamard | Kronecker) -> float:
        """The scale of a correction, within the bound."""
        if not self.max_norm:
            return self.scale
        return self.scale * float(bound(self.max_norm, correction.change().norm()))


class Hada(Changed):
    """LoHa: (A1 B1) * (A2 B2) (Hyeon-Woo 2021, arXiv 2108.06098); `a2` starts as zero."""

    def __init__(self, site: Site, config: LoraConfig, network: Network) -> None:
        super().__init__(site, config, network)
        out, rest = self.form[0], math.prod(self.form[1:])
        self.a1, self.b1 = self.new(out, self.rank, std=0.1), self.new(self.rank, rest, std=1.0)
        self.a2, self.b2 = self.new(out, self.rank, std=0.0), self.new(self.rank, rest, std=1.0)

    def change(self) -> Tensor:
        return ((self.a1 @ self.b1) * (self.a2 @ self.b2)).view(self.form)

    def correction(self, parts: Mapping[str, Tensor]) -> Hadamard:
        sides = [parts[k] for k in ("a1", "b1", "a2", "b2")]
        made = Hadamard(*sides, self.scale, self.form, parts.get("magnitude"))  # type: ignore[misc]
        scale = self.within(made)
        return made if scale == made.scale else Hadamard(*sides, scale, self.form, parts.get("magnitude"))  # type: ignore[misc]

    def parts(self, given: Correction) -> dict[str, Tensor | None]:
        if not isinstance(given, Hadamard):
            raise self._refuse(given)
        sides = {"a1": given.a1, "b1": given.b1, "a2": given.a2 * (given.scale / self.scale), "b2": given.b2}
        return {**sides, "magnitude": given.magnitude}


class Kron(Changed):
    """LoKr: a Kronecker product (Yeh 2023, arXiv 2309.14859), the second one whole or low-rank, zero at first."""

    def __init__(self, site: Site, config: LoraConfig, network: Network) -> None:
        super().__init__(site, config, network)
        (j, k), (m, n) = split(self.form[0], config.factor), split(self.form[1], config.factor)
        kernel, r = self.form[2:], self.rank
        self.second = (k, n, *kernel)
        if config.decompose_both and r < max(j, m) / 2 and not config.full_matrix:
            self.w1_a, self.w1_b = self.new(j, r), self.new(r, m)
            self.w1 = None
        else:
            self.w1 = self.new(j, m)
        if config.full_matrix or r >= max(k, n) / 2:
            self.w2 = self.new(k, n, *kernel, std=0.0)
        else:
            self.w2 = None
            self.w2_a, self.w2_b = self.new(k, r), self.new(r, n * math.prod(kernel), std=0.0)
        if self.w1 is not None and self.w2 is not None:
            self.scale = 1.0  # as LyCORIS has it, whose readers leave alpha out

    def change(self) -> Tensor:
        w1 = self.w1_a @ self.w1_b if self.w1 is None else self.w1
        w2 = (self.w2_a @ self.w2_b).view(self.second) if self.w2 is None else self.w2
        return _kron(w1, w2).reshape(self.form)

    def correction(self, parts: Mapping[str, Tensor]) -> Kronecker:
        w1 = parts["w1_a"] @ parts["w1_b"] if self.w1 is None else parts["w1"]
        low, high = parts.get("w2_a"), parts.get("w2_b")
        w2 = parts["w2"] if low is None or high is None else (low @ high).view(self.second)
        made = Kronecker(w1, w2, self.scale, self.form, parts.get("magnitude"), 0, low, high)
        scale = self.within(made)
        return made if scale == made.scale else Kronecker(w1, w2, scale, self.form, made.magnitude, 0, low, high)

    def parts(self, given: Correction) -> dict[str, Tensor | None]:
        if not isinstance(given, Kronecker) or (given.low is None) != (self.w2 is not None) or self.w1 is None:
            raise self._refuse(given)
        first = given.w1 * (given.scale / self.scale)
        return {"w1": first, "w2": given.w2, "w2_a": given.low, "w2_b": given.high, "magnitude": given.magnitude}


class Turn(Layer):
    """OFT: outputs turned in blocks (Qiu 2023, arXiv 2306.07280), as LyCORIS' diag-oft; Q starts as zero."""

    def __init__(self, site: Site, config: LoraConfig, network: Network) -> None:
        super().__init__(site, config)
        weight = site.read()
        self.form = tuple(weight.shape)
        side, count = split(self.form[0], self.rank)
        self.blocks = nn.Parameter(torch.zeros(count, side, side, device=network.runs_on(weight)))
        self.constraint = config.constraint * self.form[0]

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        count, side = self.blocks.shape[:2]
        turn = turned(skewed(self.blocks.float(), self.constraint))
        if self.rank_dropout and self.dropping:
            turn = turn * (torch.rand(count, 1, 1, device=turn.device) >= self.rank_dropout)
        turn, bias = turn.to(out.dtype), self._site.read_bias()
        if self._conv:
            own = out if bias is None else out - bias.view(-1, 1, 1).to(out.dtype)
            added = torch.einsum("kij,bkihw->bkjhw", turn, own.unflatten(1, (count, side))).flatten(1, 2)
        else:
            own = out if bias is None else out - bias.to(out.dtype)
            added = torch.einsum("kij,...ki->...kj", turn, own.unflatten(-1, (count, side))).flatten(-2)
        return out + self.kept(added)

    def correction(self, parts: Mapping[str, Tensor]) -> Rotation:
        return Rotation(skewed(parts["blocks"].float(), self.constraint), self.form)

    def parts(self, given: Correction) -> dict[str, Tensor | None]:
        if not isinstance(given, Rotation) or given.inputs or given.terms or given.rescale is not None:
            raise self._refuse(given)
        return {"blocks": given.skew / 2}


MODULES: dict[str, type[Low | Hada | Kron | Turn]] = {"lora": Low, "loha": Hada, "lokr": Kron, "oft": Turn}
"""By `LoraConfig.algo`."""


def low_rank(parts: Mapping[str, Tensor], name: str, config: LoraConfig) -> LowRank:
    """The correction of a layer that `Low` trains, from its weights by name."""
    up, alpha = parts["up"], config.alpha_of(name)
    if config.max_norm:
        up = up * bound(config.max_norm, _norm(parts["down"], up, alpha / config.rank_of(name)))
    return LowRank(parts["down"], up, alpha, parts.get("magnitude"))


def bound(most: float, norm: Tensor) -> Tensor:
    """What a change of a norm is multiplied with so that it stays within `most`; a constant of the gradient."""
    return (most / norm.detach().clamp(min=1e-12)).clamp(max=1.0)


def _norm(down: Tensor, up: Tensor, scale: float) -> Tensor:
    """|scale up down|, by the small products: |U D|^2 = tr((U^T U)(D D^T))."""
    d, u = down.detach().flatten(1).float(), up.detach().flatten(1).float()
    return scale * ((u.T @ u) * (d @ d.T)).sum().clamp(min=0).sqrt()


def split(length: int, factor: int) -> tuple[int, int]:
    """A length as a product (small, large): the small one `factor`, or the largest divisor that is not above it.

    -1 is the most even split. As LyCORIS does it, a factor above the square root that divides the length is the large.
    """
    if factor > 0 and length % factor == 0:
        return min(factor, length // factor), max(factor, length // factor)
    most = math.isqrt(length) if factor < 0 else min(factor, math.isqrt(length))
    small = next(d for d in range(most, 0, -1) if length % d == 0)
    return small, length // small


def skewed(blocks: Tensor, constraint: float) -> Tensor:
    """Q = B - B^T (k, s, s), as a whole shortened to the norm `constraint` where this is above 0."""
    skew = blocks - blocks.transpose(1, 2)
    if not constraint:
        return skew
    return skew * (constraint / (skew.norm() + 1e-8)).clamp(max=1.0)


def _kron(w1: Tensor, w2: Tensor) -> Tensor:
    """The Kronecker product of (a, b) and (c, d[, kh, kw])."""
    a, b = w1.shape
    c, d, *kernel = w2.shape
    return (w1.view(a, 1, b, 1, *[1] * len(kernel)) * w2.view(1, c, 1, d, *kernel)).reshape(a * c, b * d, *kernel)
