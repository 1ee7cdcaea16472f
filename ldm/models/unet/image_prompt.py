"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721): a picture as a prompt, by cross-attentions beside the text's.

What an image encoder has of the picture becomes tokens, and of these each cross-attention makes keys and values, whose
answer is added to the text's. Names of weights are those of the published files.

Legend: B batch, S places of the image encoder, F its features, N tokens, D width of the tokens, C channels of a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.models.attention import attention
from ldm.models.network import Network
from ldm.models.unet.config import DOWN, MID, UP, UNetConfig

STATES = "image_states"
"""The key of a batch, and of `cond` in training: what the image encoder has of the picture, (B, F) or (B, S, F)."""
Kind = Literal["plain", "plus", "full"]
HEAD = 64
"""Width of a head of the resampler."""


@dataclass(frozen=True, kw_only=True)
class IPAdapterConfig:
    """`kind`: "plain" projects the picture's embedding to `tokens` (N); "plus" resamples the states before the image
    encoder's last layer to as many by attention, in `depth` layers of `hidden` channels and `heads` of 64 each; "full"
    makes one token of each of these states.

    `features` F, `width` D; `layers`: C of the cross-attentions, in the order of the files (down, up, middle).
    """

    kind: Kind = "plain"
    features: int
    width: int
    layers: tuple[int, ...]
    tokens: int = 4
    hidden: int = 768
    depth: int = 4
    heads: int = 12

    def __post_init__(self) -> None:
        if self.kind not in ("plain", "plus", "full"):
            raise ValueError(f"kind {self.kind!r} is not one of ['plain', 'plus', 'full']")
        for name in ("features", "width", "tokens", "hidden", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def sees_states(self) -> bool:
        """Whether it is shown the states of all places, not the embedding of the whole."""
        return self.kind != "plain"

    @staticmethod
    def of(unet: Any, features: int, kind: Kind = "plain", tokens: int | None = None) -> IPAdapterConfig:
        """Of a new one for a U-Net, with the published sizes: 4 tokens, of "plus" 16, in D (768) or at most 1280 wide.

        Raises ValueError for settings of another network, and for a U-Net whose levels have texts of several widths.
        """
        if not isinstance(unet, UNetConfig):
            raise ValueError(f"an IP-Adapter is of a U-Net here, not of a network of kind {unet.kind!r}")
        widths = set(unet.per_level("cross_attention_dim"))
        if len(widths) > 1:
            raise ValueError(f"cross_attention_dim {sorted(widths)}: an IP-Adapter has one value for all levels")
        width = widths.pop()
        hidden = max(HEAD, min(width, 1280) // HEAD * HEAD)
        layers = tuple(channels for _, channels in sorted(places(unet)))
        usual = 4 if kind == "plain" else 16
        return IPAdapterConfig(kind=kind, features=features, width=width, layers=layers,
                               tokens=usual if tokens is None else tokens, hidden=hidden,
                               heads=hidden // HEAD)  # fmt: skip


def places(unet: UNetConfig) -> list[tuple[int, int]]:
    """Number in the files and channels of each cross-attention, in running order.

    Files count all attentions in the order down, up, middle, in which the cross-attentions are the odd ones.
    """
    layers, depths = unet.per_level("layers_per_block"), unet.per_level("transformer_layers_per_block")
    widths, levels = unet.block_out_channels, range(unet.levels)
    down, up = list[int](), list[int]()
    for kind, i in zip(unet.down_block_types, levels, strict=True):
        down += [widths[i]] * (layers[i] * depths[i] if kind == DOWN[0] else 0)
    for kind, i in zip(unet.up_block_types, reversed(levels), strict=True):
        up += [widths[i]] * ((layers[i] + 1) * depths[i] if kind == UP[0] else 0)
    mid = [widths[-1]] * (depths[-1] if unet.mid_block_type == MID[0] else 0)
    stored = list(zip(itertools.count(1, 2), [*down, *up, *mid]))
    return [*stored[: len(down)], *stored[len(down) + len(up) :], *stored[len(down) : len(down) + len(up)]]


class Projection(nn.Module):
    """(B, F) -> (B, N, D): a linear layer and a norm."""

    def __init__(self, features: int, width: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(features, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).unflatten(-1, (self.tokens, -1)))


class EachPlace(nn.Module):
    """(B, S, F) -> (B, S, D), place by place."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(features, features), nn.GELU(), nn.Linear(features, width), nn.LayerNorm(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Resampling(nn.Module):
    """Tokens (B, N, C) look at places and at themselves (Perceiver; Flamingo, arXiv 2204.14198)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * HEAD
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_kv = nn.Linear(channels, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, channels, bias=False)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        tokens = self.norm2(tokens)
        k, v = self.to_kv(torch.cat([self.norm1(x), tokens], dim=1)).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.to_q(tokens), k, v))
        return self.to_out(attention(q, k, v).flatten(2))


class Resampler(nn.Module):
    """(B, S, F) -> (B, N, D): learned tokens that look at the places in some layers."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.latents = nn.Parameter(torch.randn(1, config.tokens, hidden) / hidden**0.5)
        self.proj_in, self.proj_out = nn.Linear(config.features, hidden), nn.Linear(hidden, config.width)
        self.norm_out = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(
            nn.ModuleList([Resampling(hidden, config.heads), _feed_forward(hidden)]) for _ in range(config.depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x, tokens = self.proj_in(x), self.latents.expand(len(x), -1, -1)
        for look, feed in self.layers:  # type: ignore[misc]
            tokens = tokens + look(x, tokens)
            tokens = tokens + feed(tokens)
        return self.norm_out(self.proj_out(tokens))


def _feed_forward(channels: int) -> nn.Module:
    inner = 4 * channels
    return nn.Sequential(
        nn.LayerNorm(channels), nn.Linear(channels, inner, bias=False), nn.GELU(),
        nn.Linear(inner, channels, bias=False),
    )  # fmt: skip


class _Layer(nn.Module):
    """The keys and values of one cross-attention."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(width, channels, bias=False)
        self.to_v_ip = nn.Linear(width, channels, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.to_k_ip(tokens), self.to_v_ip(tokens)], dim=-1)


class IPAdapter(nn.Module):
    """States of the image encoder -> what a U-Net's cross-attentions look at beside the text."""

    title = "IP-Adapter"

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.image_proj = _projection(config)
        self.ip_adapter = nn.ModuleDict(
            {str(2 * i + 1): _Layer(config.width, channels) for i, channels in enumerate(config.layers)}
        )

    @staticmethod
    def beside(unet: Network, features: int, kind: Kind = "plain", tokens: int | None = None) -> IPAdapter:
        """A new one, whose keys and values are at first those that the U-Net makes of text. It is where the U-Net is.

        Raises ValueError as `IPAdapterConfig.of` does.
        """
        made = IPAdapter(IPAdapterConfig.of(unet.config, features, kind, tokens))
        made = made.to(next(unet.parameters()).device)
        cross = [layer for _, layer, looks in unet.attention_layers() if looks == "cross"]
        weights = dict[str, Tensor]()
        for (number, _), layer in zip(places(unet.config), cross, strict=True):
            weights[f"{number}.to_k_ip.weight"] = layer.to_k.weight.detach().float()  # type: ignore[union-attr]
            weights[f"{number}.to_v_ip.weight"] = layer.to_v.weight.detach().float()  # type: ignore[union-attr]
        made.ip_adapter.load_state_dict(weights, strict=True)
        return made

    def forward(self, states: Tensor, order: Sequence[int]) -> Tensor:
        """(B, N, ...) for states (B, F) or (B, S, F): keys and values of all layers, in the `order` of their numbers.

        Raises ValueError for states of another shape.
        """
        self.check(states)
        tokens = self.image_proj(states.to(next(self.parameters()).dtype))
        return torch.cat([self.ip_adapter[str(number)](tokens) for number in order], dim=-1)

    def check(self, states: Tensor) -> None:
        """Raise ValueError unless states are (B, F), or (B, S, F) where it is shown those of all places."""
        config = self.config
        if states.ndim != 2 + config.sees_states or states.shape[-1] != config.features:
            want = f"(B, {'S, ' * config.sees_states}{config.features})"
            raise ValueError(f"image states of shape {tuple(states.shape)}, but this {self.title} takes {want}")


def weighted(kv: Tensor, scale: float, channels: Sequence[int]) -> Tensor:
    """Keys and values whose answer is `scale` times as large; `channels` of the layers in running order."""
    if scale == 1:
        return kv
    ones = [torch.cat([kv.new_ones(c), kv.new_full((c,), scale)]) for c in channels]
    return kv * torch.cat(ones)


def joined(kv: Tensor) -> Tensor:
    """Of several pictures (M, N, ...) that are looked at as one: (1, M N, ...)."""
    return kv.flatten(0, 1)[None]


def _projection(config: IPAdapterConfig) -> nn.Module:
    if config.kind == "plain":
        return Projection(config.features, config.width, config.tokens)
    return Resampler(config) if config.kind == "plus" else EachPlace(config.features, config.width)
