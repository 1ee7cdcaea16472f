"""Low-rank adaptation and its kin while they train: the frozen model outside, the corrections in one small module."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.base import freeze
from ldm.adapters.corrections import Correction, Corrections
from ldm.adapters.layers import MODULES, Layer, Low, low_rank
from ldm.adapters.lora_config import LoraConfig
from ldm.adapters.low_rank import Lora, LowRank
from ldm.adapters.sites import Site, chosen, network_sites, pooled_of, text_sites, towers, usual_targets
from ldm.models.frozen import opened
from ldm.models.network import Around, Network
from ldm.models.text import TextEncoder

__all__ = ["LoraAdapter", "LoraConfig", "LoraNet", "Low", "to_peft"]


class LoraNet(Around):
    """The corrections of all layers; called as the network is, which itself is corrected while attached.

    The network and the towers are not registered: only the corrections enter the engine.
    """

    def __init__(self, network: Network, sites: Sequence[Site], config: LoraConfig) -> None:
        super().__init__(network)
        self.layers = nn.ModuleDict({_key(site.name): MODULES[config.algo](site, config, network) for site in sites})
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
    """Corrections train; the export of low-rank ones is diffusers' and PEFT's names."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self._layers: dict[str, Layer] = {}  # of the attached module

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
        wanted = [site for site in sites if self.config.wants(site.name)]
        if not wanted:
            raise ValueError(
                f"include {list(self.config.include)} and exclude {list(self.config.exclude)} leave none of "
                f"{len(sites)} layers, such as {sites[0].name}"
            )
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self.config, key):
                if not any(re.search(pattern, site.name) for site in wanted):
                    raise ValueError(f"{key}: {pattern!r} fits none of {len(wanted)} layers, as {wanted[0].name}")
        net = LoraNet(network, wanted, self.config)
        self._layers = {key: layer for key, layer in net.layers.items() if isinstance(layer, Layer)}
        return net

    def corrections(self, weights: Mapping[str, Tensor]) -> dict[str, Correction]:
        """What was trained, from the attached module's weights by name."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in weights.items():
            _, key, kind = name.split(".")
            found.setdefault(key, {})[kind] = value.detach().clone()
        if not self._layers and self.config.algo == "lora":
            return {_name(k): low_rank(v, _name(k), self.config) for k, v in found.items()}
        return {_name(k): self._layers[k].correction(v) for k, v in found.items()}

    def lora(self, weights: Mapping[str, Tensor]) -> Lora:
        """The same of low-rank corrections. Raises ValueError for those of another algo."""
        found = self.corrections(weights)
        lows = {name: low for name, low in found.items() if isinstance(low, LowRank)}
        if len(lows) < len(found):
            raise ValueError(f"algo {self.config.algo}: expected lora")
        return lows

    @torch.no_grad()
    def load(self, net: LoraNet, lora: Corrections) -> None:
        """Undo `corrections`: those of any alpha, brought to this one's.

        Raises ValueError unless they are of the same layers, rank and kind.
        """
        own, given = {_name(key) for key in net.layers}, set(lora)
        if own != given:
            others = sorted(own ^ given)
            raise ValueError(f"corrects {len(given)} layers, targets choose {len(own)}; not in both: {others[:3]}")
        for name, low in lora.items():
            layer = net.layers[_key(name)]
            assert isinstance(layer, Layer)
            parts = layer.parts(low)
            for kind, p in layer.named_parameters(recurse=False):
                value = parts.get(kind)
                if value is None or p.numel() != value.numel():
                    shape = None if value is None else list(value.shape)
                    raise ValueError(f"{kind} {shape} of {name} is not of shape {list(p.shape)}")
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
