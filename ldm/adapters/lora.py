"""Low-rank adaptation while it trains: the frozen model outside, the corrections in one small module.

Legend: r rank, N leading axes of a layer's input.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.base import freeze
from ldm.adapters.corrections import Corrections
from ldm.adapters.low_rank import Lora, LowRank, row_norms
from ldm.adapters.sites import Site, chosen, network_sites, pooled_of, text_sites, towers, usual_targets
from ldm.models.frozen import opened
from ldm.models.network import Around, Network
from ldm.models.text import TextEncoder


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Corrections of rank `rank`, scaled by `alpha` / rank (no alpha: by 1), with `rslora` by `alpha` / sqrt(rank).

    `targets`: groups (attention, feed_forward, projection, convolution, time) or ends of layer names ("attn2.to_k");
    None is what the family's community corrects (`usual_targets`). `text` adapts the CLIP towers' layers of the same
    groups too, of attention for None. `dora` trains each output's magnitude beside the direction.
    """

    kind: Literal["lora"] = "lora"
    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    text: bool = False
    dora: bool = False
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.targets is not None and not self.targets:
            raise ValueError("targets must not be empty")

    @property
    def effective_alpha(self) -> float:
        """The alpha that, divided by the rank, gives the scale."""
        alpha = float(self.rank if self.alpha is None else self.alpha)
        return alpha * math.sqrt(self.rank) if self.rslora else alpha


class Low(nn.Module):
    """One layer's correction; starts as none, since `up` is zero. `forward(x, out)` corrects the layer's output."""

    def __init__(self, site: Site, config: LoraConfig, network: Network) -> None:
        super().__init__()
        weight, conv = site.read(), site.conv
        out, ones, device = weight.shape[0], [1] * (weight.ndim - 2), network.runs_on(weight)
        self.down = nn.Parameter(torch.empty(config.rank, *weight.shape[1:], device=device))
        self.up = nn.Parameter(torch.zeros(out, config.rank, *ones, device=device))
        self.magnitude = nn.Parameter(row_norms(weight.to(device).float())) if config.dora else None
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scale, self.dropout = config.effective_alpha / config.rank, config.dropout
        self._site = site  # its weights are not this module's
        self._conv: dict[str, Any] = {}
        if conv is not None:
            if conv.groups != 1 or conv.padding_mode != "zeros":
                raise ValueError(f"targets: {site.name} is a grouped or wrapped convolution, which LoRA does not cover")
            self._conv = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        if self.dropout and self.training and torch.is_grad_enabled():
            x = F.dropout(x, self.dropout)
        if self._conv:
            added = F.conv2d(F.conv2d(x, self.down, **self._conv), self.up)
        elif self.magnitude is None:  # one product that adds, with the scale on its small side in the backward too
            small = F.linear(x, self.down).flatten(0, -2)
            return torch.addmm(out.flatten(0, -2), small, self.up.t(), alpha=self.scale).view(out.shape)
        else:
            added = F.linear(F.linear(x, self.down), self.up)
        if self.magnitude is None:
            return torch.add(out, added, alpha=self.scale)
        return self._magnified(out, added)

    def _magnified(self, out: Tensor, added: Tensor) -> Tensor:
        """m / |V| times the sum of both, without the bias; the norm is a constant of the gradient (section 4.3)."""
        assert self.magnitude is not None
        with torch.no_grad():
            base = self._site.read().float()
            norms = row_norms(base + self.scale * (self.up.flatten(1) @ self.down.flatten(1)).view(base.shape))
        ratio, bias = self.magnitude / norms, self._site.read_bias()
        shape = (-1, 1, 1) if self._conv else (-1,)
        ratio = ratio.view(shape).to(out.dtype)
        if bias is None:
            return ratio * torch.add(out, added, alpha=self.scale)
        bias = bias.view(shape).to(out.dtype)
        return ratio * torch.add(out - bias, added, alpha=self.scale) + bias


class LoraNet(Around):
    """The corrections of all layers; called as the network is, which itself is corrected while attached.

    The network and the towers are not registered: only the corrections enter the engine.
    """

    def __init__(self, network: Network, sites: Sequence[Site], config: LoraConfig) -> None:
        super().__init__(network)
        self.layers = nn.ModuleDict({_key(site.name): Low(site, config, network) for site in sites})
        self._on = True
        self._hooked: dict[str, list[nn.Module]] = {}
        self._undo = [self._hook(site) for site in sites if not isinstance(site.module, nn.MultiheadAttention)]
        fused: dict[nn.MultiheadAttention, dict[str, str]] = {}
        for site in sites:
            if isinstance(site.module, nn.MultiheadAttention):
                fused.setdefault(site.module, {})[site.name.rpartition(".")[2]] = _key(site.name)
        self._undo += [self._replace(attention, keys) for attention, keys in fused.items()]

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the frozen one."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    @contextlib.contextmanager
    def using(self, layers: nn.ModuleDict) -> Iterator[None]:
        """Inside, other corrections of the same layers are taken: an average of these, say."""
        before = self.layers
        self._take(layers)
        try:
            yield
        finally:
            self._take(before)

    def _take(self, layers: nn.ModuleDict) -> None:
        self.layers = layers
        for key, taken in self._hooked.items():
            taken[0] = layers[key]

    def detach(self) -> None:
        """Leave the model as it was before."""
        for undo in self._undo:
            undo()
        self._undo = []

    def correct(self, key: str, x: Tensor, out: Tensor) -> Tensor:
        """A layer's corrected output."""
        return self.layers[key](x, out) if self._on else out

    def _hook(self, site: Site) -> Callable[[], None]:
        key = _key(site.name)
        taken = self._hooked[key] = [self.layers[key]]  # not the key, by which compiled code would differ by block

        def corrected(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            return taken[0](args[0], out) if self._on else out

        return site.module.register_forward_hook(corrected).remove

    def _replace(self, attention: nn.MultiheadAttention, keys: Mapping[str, str]) -> Callable[[], None]:
        """The attention's forward with corrections of q, k and v apart, whose weights are one tensor there."""
        if not attention.batch_first:
            raise ValueError("text: LoRA needs towers that take the batch axis first")

        def forward(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
            assert key is query or key.data_ptr() == query.data_ptr()
            with opened(attention):
                return self._attend(attention, keys, query, options.get("attn_mask")), None

        attention.forward = forward  # type: ignore[method-assign]
        return lambda: attention.__dict__.pop("forward") and None

    def _attend(
        self, attention: nn.MultiheadAttention, keys: Mapping[str, str], x: Tensor, mask: Tensor | None
    ) -> Tensor:
        parts = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (
            self.correct(keys[name], x, part) if name in keys else part
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True)
        )
        heads = (y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=None if mask is None else mask.to(x.dtype))
        mixed = mixed.transpose(1, 2).flatten(2)
        out = F.linear(mixed, attention.out_proj.weight, attention.out_proj.bias)
        return self.correct(keys["out_proj"], mixed, out) if "out_proj" in keys else out


class LoraAdapter:
    """Low-rank corrections train; the export is diffusers' and PEFT's names."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config

    @property
    def trains_text(self) -> bool:
        """Whether the towers are adapted too."""
        return self.config.text

    def attach(self, network: Network, text: Sequence[TextEncoder]) -> LoraNet:
        """Freeze the model and put corrections on it, which start as none."""
        freeze(network, text)
        network.train()
        words: list[Site] = []
        if self.config.text:
            if not towers(text):
                raise ValueError(
                    f"text: LoRA adapts CLIP towers alone, and the {network.title}'s text encoders are "
                    f"{[type(one).__name__ for one in text]}; write text: false"
                )
            words = text_sites(text, pooled=pooled_of(network, text))
        inner, targets = network_sites(network), self.config.targets
        if targets is None:
            sites = chosen(inner, usual_targets(network)) + (chosen(words, ("attention",)) if words else [])
        else:
            sites = chosen([*inner, *words], targets)
        return LoraNet(network, sites, self.config)

    def lora(self, weights: Mapping[str, Tensor]) -> Lora:
        """The corrections, from the attached module's weights by name."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in weights.items():
            _, key, kind = name.split(".")
            found.setdefault(key, {})[kind] = value.detach().clone()
        alpha = self.config.effective_alpha
        return {_name(k): LowRank(v["down"], v["up"], alpha, v.get("magnitude")) for k, v in found.items()}

    @torch.no_grad()
    def load(self, net: LoraNet, lora: Corrections) -> None:
        """Undo `lora`: corrections of any alpha, brought to this one's.

        Raises ValueError unless they are of the same layers, rank and kind.
        """
        own, given = {_name(key) for key in net.layers}, set(lora)
        if own != given:
            others = sorted(own ^ given)
            raise ValueError(f"corrects {len(given)} layers, targets choose {len(own)}; not in both: {others[:3]}")
        for name, low in lora.items():
            layer = net.layers[_key(name)]
            assert isinstance(layer, Low)
            if not isinstance(low, LowRank) or low.axis != 0:
                raise ValueError(
                    f"{name} is no low-rank product, or its magnitudes are by column: nothing to go on from"
                )
            if low.rank != self.config.rank:
                raise ValueError(f"rank {low.rank} of {name} is not the configured rank {self.config.rank}")
            if (low.magnitude is None) != (layer.magnitude is None):
                raise ValueError(f"{name}: one of both is DoRA; dora is {self.config.dora}")
            parts = {"down": low.down, "up": low.up * (low.scale / layer.scale), "magnitude": low.magnitude}
            for kind, p in layer.named_parameters(recurse=False):
                value = parts[kind]
                assert value is not None
                if p.numel() != value.numel():
                    raise ValueError(f"{kind} {list(value.shape)} of {name} is not of shape {list(p.shape)}")
                p.copy_(value.view(p.shape))

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`pytorch_lora_weights.safetensors`: PEFT's names, the scale inside `lora_B`."""
        return to_peft(self.lora(weights))


def to_peft(lora: Lora) -> dict[str, Tensor]:
    """Tensors under diffusers' and PEFT's names; the scale is inside `lora_B`, so that every reader agrees on it."""
    out = {}
    for name, low in lora.items():
        out[f"{name}.lora_A.weight"] = low.down.contiguous()
        out[f"{name}.lora_B.weight"] = (low.up * low.scale).contiguous()
        if low.magnitude is not None:
            shape = (1, -1, 1, 1) if low.down.ndim == 4 else (-1,)
            out[f"{name}.lora_magnitude_vector"] = low.magnitude.view(shape).contiguous()
    return out


def _key(name: str) -> str:
    """A site's name as a module's, which may hold no dot."""
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".")
