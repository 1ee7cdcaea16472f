"""Z-Image's transformer (Tongyi 2025, arXiv 2511.22699) with diffusers' parameter names and config keys.

Legend: B batch, C channels, H, W latent pixels, N image tokens, T text tokens, D width, E width of the time's vector,
S tokens, R width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.layers import check_equal, sinusoid
from ldm.models.transformers.base import NOTHING, Transformer, check_counts
from ldm.models.transformers.blocks import TIME, Attention, RMSNorm, normed
from ldm.models.transformers.positions import Rotary, from_patches, middles
from ldm.models.transformers.routing import Routed
from ldm.models.wide import Linear
from ldm.types import Cond

SEVERAL = 32
"""Text and image are each filled up with learned tokens to a multiple of so many."""
HIDDEN = 1024
"""Channels between the two layers of the time's embedding."""


@dataclass(frozen=True, kw_only=True)
class ZImageConfig:
    """The keys of diffusers' ZImageTransformer2DModel `config.json`, with its defaults.

    Patches are of one size, `all_patch_size`, and of one frame; keys that only take one value here are checked.
    `axes_lens`: positions that there are, of text and of rows and columns of patches.
    """

    kind: Literal["zimage"] = "zimage"
    all_patch_size: tuple[int, ...] = (2,)
    all_f_patch_size: tuple[int, ...] = (1,)
    """Only [1] is taken."""
    in_channels: int = 16
    """Channels of the latents."""
    dim: int = 3840
    """The width, a multiple of `n_heads`."""
    n_layers: int = 30
    """Number of blocks that see text and picture together."""
    n_refiner_layers: int = 2
    """Number of blocks of the text alone, and of the picture alone, before."""
    n_heads: int = 30
    """Number of heads."""
    n_kv_heads: int = 30
    """Only `n_heads` is taken."""
    norm_eps: float = 1e-5
    """Added to the mean square in norms."""
    qk_norm: bool = True
    """Whether queries and keys are normalised."""
    cap_feat_dim: int = 2560
    """Width of the text states."""
    siglip_feat_dim: int | None = None
    """Only null is taken."""
    rope_theta: float = 256.0
    """Base of the frequencies of rotations."""
    t_scale: float = 1000.0
    """What times in [0, 1] are multiplied by before they are embedded."""
    axes_dims: tuple[int, int, int] = (32, 48, 48)
    """Rotated channels of each axis, three even numbers that add up to dim / `n_heads`."""
    axes_lens: tuple[int, int, int] = (1024, 512, 512)

    def __post_init__(self) -> None:
        check_counts(self, "in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "cap_feat_dim")
        check_equal("all_f_patch_size", self.all_f_patch_size, (1,))
        check_equal("n_kv_heads", self.n_kv_heads, self.n_heads)
        check_equal("siglip_feat_dim", self.siglip_feat_dim, None)
        if len(self.all_patch_size) != 1 or self.all_patch_size[0] < 1:
            raise ValueError(f"all_patch_size {list(self.all_patch_size)}: expected one number of at least 1")
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} must be a multiple of n_heads {self.n_heads}")
        head, axes = self.dim // self.n_heads, self.axes_dims
        if len(axes) != 3 or sum(axes) != head or any(a < 0 or a % 2 for a in axes):
            raise ValueError(f"axes_dims {list(axes)}: expected 3 even numbers that add up to {head}")
        if len(self.axes_lens) != 3 or any(count < 1 for count in self.axes_lens):
            raise ValueError(f"axes_lens {list(self.axes_lens)}: expected 3 numbers of at least 1")

    @property
    def patch(self) -> int:
        """Latent pixels along a side of a token."""
        return self.all_patch_size[0]

    @property
    def told(self) -> int:
        """E."""
        return min(self.dim, TIME)


class GatedFeedForward(nn.Module):
    """w2(silu(w1 x) w3 x) with 8/3 of the width between (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(width / 3 * 8)
        self.w1 = Linear(width, hidden, bias=False)
        self.w2 = Linear(hidden, width, bias=False)
        self.w3 = Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ZImageBlock(nn.Module):
    """Self-attention and feed-forward, each between two norms; with `told` scaled and gated by the time."""

    def __init__(self, config: ZImageConfig, *, told: bool) -> None:
        super().__init__()
        width, eps = config.dim, config.norm_eps
        self.attention = Attention(width, config.n_heads, qk_norm=config.qk_norm, bias=False, out_bias=False, eps=1e-5)
        self.feed_forward = GatedFeedForward(width)
        self.attention_norm1, self.attention_norm2 = RMSNorm(width, eps), RMSNorm(width, eps)
        self.ffn_norm1, self.ffn_norm2 = RMSNorm(width, eps), RMSNorm(width, eps)
        self.adaLN_modulation = nn.Sequential(Linear(config.told, 4 * width)) if told else None

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None, vector: Tensor | None = None) -> Tensor:
        """(B, S, D) under the time's vector (B or 1, E); `mask` (B, 1, 1, S) is True where a token is seen."""
        if self.adaLN_modulation is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), mask=mask, rotary=rotary))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        scale, gate, ff_scale, ff_gate = self.adaLN_modulation(vector)[:, None].chunk(4, dim=-1)
        h = self.attention(self.attention_norm1(x) * (1 + scale), mask=mask, rotary=rotary)
        x = torch.addcmul(x, gate.tanh(), self.attention_norm2(h))
        h = self.feed_forward(self.ffn_norm1(x) * (1 + ff_scale))
        return torch.addcmul(x, ff_gate.tanh(), self.ffn_norm2(h))


class FinalLayer(nn.Module):
    """Layer norm scaled by the time, and one Linear to the pixels of a patch."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.linear = Linear(config.dim, config.patch**2 * config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.told, config.dim))

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        return self.linear(normed(x) * (1 + self.adaLN_modulation(vector)[:, None]))


class TimeEmbedding(nn.Module):
    """Times through their sinusoid and two layers."""

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.scale = config.t_scale
        self.mlp = nn.Sequential(Linear(TIME, HIDDEN), nn.SiLU(), Linear(HIDDEN, config.told))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t (B,) or (1,) in 0 ... 1000 -> (B or 1, E). The network was trained with 1 for data and 0 for noise."""
        return self.mlp(sinusoid((1000 - t.reshape(-1)) / 1000 * self.scale, TIME).to(dtype))


class ZImageTransformer(Transformer):
    """Noisy latents, times and conditioning -> velocity, noise - x_0: the network's own answer with its sign turned.

    `cond`: "text" (B, T, D') and "mask" (B, T), True at its tokens, all of them without one; in their place `prepared`
    puts "context" (B, T', D), the refined text with its learned padding, and "mask" (B, T').
    Texts of one batch may have other lengths: each is filled up by itself, and sees no more of the batch.
    """

    title = "Z-Image transformer"
    groups: ClassVar = {
        "attention": r"\.attention\.",
        "time": r"^t_embedder|adaLN",
        "feed_forward": r"\.feed_forward\.",
        "projection": r"^(all_x_embedder|all_final_layer|cap_embedder)",
    }

    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.dim, config.patch
        self.in_channels = self.out_channels = self.latent_channels = config.in_channels
        self.multiple, self.needs, self.known = patch, frozenset({"text"}), "context"
        self._size = f"{patch}-1"
        self.all_x_embedder = nn.ModuleDict({self._size: Linear(patch**2 * config.in_channels, width)})
        self.all_final_layer = nn.ModuleDict({self._size: FinalLayer(config)})
        few, many = range(config.n_refiner_layers), range(config.n_layers)
        self.noise_refiner = nn.ModuleList(ZImageBlock(config, told=True) for _ in few)
        self.context_refiner = nn.ModuleList(ZImageBlock(config, told=False) for _ in few)
        self.t_embedder = TimeEmbedding(config)
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, config.norm_eps), Linear(config.cap_feat_dim, width)
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, width))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, width))
        self.layers = nn.ModuleList(ZImageBlock(config, told=True) for _ in many)
        told = [module for name, module in self.named_modules() if "adaLN_modulation." in name]
        self._start([self.all_final_layer[self._size].get_submodule("linear"), *told])
        for token in (self.x_pad_token, self.cap_pad_token):
            nn.init.normal_(token, std=0.02)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, *, skip: frozenset[int] = NOTHING) -> Tensor:
        """t is sigma x 1000. `skip` counts the blocks of text and image together, after the refiners.

        Raises ValueError for a picture or a text of more tokens than there are positions.
        """
        patch, size = self.config.patch, (x.shape[2], x.shape[3])
        x = self._latents(x, cond, self.config.in_channels)
        cond = self._ready(cond)
        text, mask, vector = cond["context"], cond.get("mask"), self.t_embedder(t, x.dtype)
        b, h, w = len(x), size[0] // patch, size[1] // patch
        full = _several(h * w)
        x = x.unflatten(2, (h, patch)).unflatten(4, (w, patch)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        x = self.all_x_embedder[self._size](x)
        x = torch.cat([x, self.x_pad_token.to(x.dtype).expand(b, full - h * w, -1)], dim=1)
        lengths = x.new_full((1,), text.shape[1], dtype=torch.long) if mask is None else mask.sum(1)
        rotary = self._turns(self._image_places(lengths, h, w, full), x.dtype)
        for block in self.noise_refiner:
            x = self._run(block, x, rotary, None, vector)
        x = torch.cat([x, text.to(x.dtype)], dim=1)
        cos, sin = (
            torch.cat([image.expand(b, -1, -1, -1), words.expand(b, -1, -1, -1)], dim=1)
            for image, words in zip(rotary, self._turns(self._text_places(text), x.dtype), strict=True)
        )
        seen = None if mask is None else _shown(torch.cat([mask.new_ones(b, full), mask], dim=1))
        routed = Routed(self.routing, cond.get("route"), full)
        for i, block in enumerate(self.layers):
            if i not in skip:
                turns, shown = routed.rotary(i, (cos, sin)), routed.mask(i, seen)
                x = routed.leave(i, self._run(block, routed.enter(i, x), turns, shown, vector))
                self.pass_by(str(i), x[:, : h * w])
        x = self.all_final_layer[self._size](x[:, : h * w], vector)
        return -from_patches(x, size, patch)

    def prepared(self, cond: Cond) -> Cond:
        """With "context" (B, T', D) in the place of the text, refined without the time, and "mask" (B, T').

        T' is the longest text's length filled up, or T filled up where shapes may not depend on numbers.
        """
        text = self._told(cond, text=self.config.cap_feat_dim)["text"]
        mask = cond["mask"].bool() if "mask" in cond else text.new_ones(text.shape[:2], dtype=torch.bool)
        lengths = mask.sum(1)
        held = _several(lengths).clamp(min=SEVERAL)
        total = int(held.max()) if _known(held) else _several(text.shape[1])
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # tokens first, whatever stands between them
        text = text.gather(1, order[..., None].expand_as(text))[:, :total]
        text = self.cap_embedder(F.pad(text, (0, 0, 0, total - text.shape[1])))
        place = torch.arange(total, device=text.device)
        own = (place < lengths[:, None])[..., None]
        text = torch.where(own, text, self.cap_pad_token.to(text.dtype))
        seen = place < held[:, None]
        rotary = self._turns(self._text_places(text), text.dtype)
        for block in self.context_refiner:
            text = self._run(block, text, rotary, _shown(seen))
        return self._rest(cond, "text", "mask") | {"context": text, "mask": seen}

    def _text_places(self, text: Tensor) -> Tensor:
        """(1, T', 3): texts run along the first axis from 1 on, their padding too."""
        count, most = text.shape[1], self.config.axes_lens[0]
        if count + 2 > most:
            raise ValueError(
                f"a text of {count} tokens and the picture are more than axes_lens {most} along the first axis"
            )
        place = torch.arange(1, count + 1, device=text.device)
        return torch.stack([place, 0 * place, 0 * place], dim=-1)[None]

    def _image_places(self, lengths: Tensor, h: int, w: int, full: int) -> Tensor:
        """(B or 1, S, 3): patches at the next place after their text, row and column; their padding at 0."""
        for name, count, most in zip(("rows", "columns"), (h, w), self.config.axes_lens[1:], strict=True):
            if count * self.averaged > most:
                raise ValueError(f"{count * self.averaged} {name} of patches are more than axes_lens {most}")
        index = torch.arange(h * w, device=lengths.device)
        after = (lengths + 1)[:, None].expand(-1, h * w)
        rows, columns = (middles(i, self.averaged).expand_as(after) for i in (index // w, index % w))
        places = torch.stack([after.to(rows.dtype), rows, columns], dim=-1)
        return F.pad(places, (0, 0, 0, full - h * w))

    def _turns(self, places: Tensor, dtype: torch.dtype) -> Rotary:
        """Cosines and sines (B or 1, S, 1, R/2) for places (B or 1, S, 3).

        Angles are rounded to float32, as they were when the published weights were trained, but for float64.
        """
        device = places.device
        where = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        axis = torch.tensor([k for k, d in enumerate(self.config.axes_dims) for _ in range(d // 2)], device=where)
        power = [i / d for d in self.config.axes_dims for i in range(0, d, 2)]
        omega = 1 / self.config.rope_theta ** torch.tensor(power, dtype=torch.float64, device=where)
        angles = places.to(where)[..., axis].double() * omega
        angles = angles if dtype == torch.float64 else angles.float()
        return angles.cos()[:, :, None].to(device), angles.sin()[:, :, None].to(device)

    @property
    def known_width(self) -> int:
        return self.config.dim

    def prepared_numbers(self, rows: int, tokens: int) -> int:
        return super().prepared_numbers(rows, _several(tokens))

    @property
    def width(self) -> int:
        return self.config.dim

    @property
    def side(self) -> int:
        """Of pictures of 1024 pixels, which the published files do not tell."""
        return 128

    @property
    def depth(self) -> int:
        return len(self.layers)

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """ "context_refiner.0" and so on, then "noise_refiner.0", then "layers.0"."""
        for name in ("context_refiner", "noise_refiner", "layers"):
            for i, block in enumerate(self.get_submodule(name).children()):
                yield f"{name}.{i}", block


def _known(numbers: Tensor) -> bool:
    """Whether what runs may depend on them: not while compiling, nor on the meta device."""
    return not torch.compiler.is_compiling() and numbers.device.type != "meta"


def _shown(seen: Tensor) -> Tensor | None:
    """The mask (B, 1, 1, S) of tokens (B, S); None, for which attention is faster, where all are seen."""
    return None if _known(seen) and bool(seen.all()) else seen[:, None, None]


def _several(count: Any) -> Any:
    """Of a number, or of a tensor of numbers, the next multiple of 32."""
    return (count + SEVERAL - 1) // SEVERAL * SEVERAL
