"""Layers that the transformers share, with diffusers' parameter names.

Legend: B batch, N image tokens, T text tokens, S tokens, D width, E = D the width of the conditioning vector.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import onednn
from ldm.models.attention import Control, attention, controlled
from ldm.models.frozen import opened
from ldm.models.frugal import norm_modulated, rms_norm
from ldm.models.layers import Embedding, hooked, sinusoid
from ldm.models.transformers.positions import Rotary, rotated
from ldm.models.wide import Linear, gelu_linear

Vector = Tensor | Mapping[nn.Module, Tensor] | tuple[Tensor, ...]
"""The activated conditioning vector (B, E), or what each modulation makes of it (B, parts x D).

A block is given those of its own modulations, in their order: compiled code of it then serves all equal blocks.
"""

TIME = 256
"""Channels of the sinusoid of times and of guidance scales."""


def normed(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm without weights; its statistics are float32 in half precision."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def norm_and_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Both of them; in training the normalised x is not kept for the backward pass but computed again."""
    kept_small = torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.dtype == shift.dtype == scale.dtype
    return norm_modulated(x, shift, scale, eps) if kept_small else modulated(normed(x, eps), shift, scale)


def bounded(x: Tensor) -> Tensor:
    """float16 within its finite numbers, as diffusers keeps FLUX's residuals there; other types as they are."""
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


class RMSNorm(nn.Module):
    """Root mean square norm of the last axis (arXiv 1910.07467); its statistics are float32 in half precision."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps).to(x.dtype)


class Modulation(nn.Module):
    """The activated conditioning vector (B, E) -> `parts` vectors (B, 1, D), of one Linear (arXiv 2212.09748).

    It starts at zero: blocks that it gates start as the identity.
    """

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = Linear(width, parts * width)
        self.place = 0  # among the modulations of its block

    def forward(self, vector: Vector) -> tuple[Tensor, ...]:
        if isinstance(vector, Tensor):
            out = self.linear(vector)
        else:
            out = vector[self.place] if isinstance(vector, tuple) else vector[self]
        return out[:, None].chunk(self.parts, dim=-1)


class GELU(nn.Module):
    """gelu(Linear(x)), with the tanh approximation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Two layers with four times the width between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELU(width, 4 * width), nn.Identity(), Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """In training gelu(...) is not kept for the backward pass but computed again, and else it is done in place."""
        first, last = self.net[0], self.net[2]
        if type(first) is not GELU or hooked(first) or torch.compiler.is_compiling():
            return last(first(x))
        if not torch.is_grad_enabled():
            bare = type(first.proj) is Linear and not hooked(first.proj)
            at_once = onednn.linear_gelu(x, first.proj.weight, first.proj.bias) if bare else None
            return last(torch.ops.aten.gelu_(first.proj(x), approximate="tanh") if at_once is None else at_once)
        hidden = first.proj(x)
        if not isinstance(last, Linear) or hooked(last):  # a correction of it, or ZeRO 3, which gathers its weights
            return last(F.gelu(hidden, approximate="tanh"))
        with opened(last):
            return gelu_linear(hidden, last.weight, last.bias)


class Attention(nn.Module):
    """Attention of x on itself, or on a source of another width; `out` False leaves out the last projection.

    `out_bias` is its bias, as `bias` is the others'; `eps` of the norms of queries and keys.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        source: int | None = None,
        qk_norm: bool = False,
        bias: bool = True,
        out: bool = True,
        out_bias: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=bias)
        self.to_k = Linear(source or width, width, bias=bias)
        self.to_v = Linear(source or width, width, bias=bias)
        self.norm_q = RMSNorm(width // heads, eps) if qk_norm else None
        self.norm_k = RMSNorm(width // heads, eps) if qk_norm else None
        self.to_out = nn.ModuleList([Linear(width, width, bias=out_bias)]) if out else None
        self.control: Control | None = None

    def forward(
        self,
        x: Tensor,
        source: Tensor | None = None,
        kv: Tensor | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """`kv` (B, T, 2D) is what `keys_values` gave for the source, instead of it; `mask` (B, 1, 1, T) is True where
        a key is seen."""
        if kv is None:
            source = x if source is None else source
            k, v = self.to_k(source), self.to_v(source)
        else:
            k, v = kv.chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.to_q(x), k, v))
        q = _turned(q, self.norm_q, rotary)
        k = _turned(k, self.norm_k, rotary)
        out = attention(q, k, v, mask) if self.control is None else controlled(q, k, v, self.control, mask)
        out = out.flatten(2)
        return out if self.to_out is None else self.to_out[0](out)

    def keys_values(self, source: Tensor) -> Tensor:
        """(B, T, 2D)."""
        return torch.cat([self.to_k(source), self.to_v(source)], dim=-1)


def _turned(x: Tensor, norm: nn.Module | None, rotary: Rotary | None) -> Tensor:
    x = x if norm is None else norm(x)
    return x if rotary is None else rotated(x, rotary)


class JointAttention(nn.Module):
    """Attention of text and image tokens on both, each with its own projections (arXiv 2403.03206, section 4).

    Text comes first; without a mask the order changes nothing but roundings. `text_out` False drops what text is given.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, text_out: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width)
        self.to_k = Linear(width, width)
        self.to_v = Linear(width, width)
        self.add_q_proj = Linear(width, width)
        self.add_k_proj = Linear(width, width)
        self.add_v_proj = Linear(width, width)
        self.to_out = nn.ModuleList([Linear(width, width)])
        self.to_add_out = Linear(width, width) if text_out else None
        self.norm_q = RMSNorm(width // heads) if qk_norm else None
        self.norm_k = RMSNorm(width // heads) if qk_norm else None
        self.norm_added_q = RMSNorm(width // heads) if qk_norm else None
        self.norm_added_k = RMSNorm(width // heads) if qk_norm else None
        self.control: Control | None = None

    def forward(self, x: Tensor, text: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, N, D), (B, T, D) -> what is to be added to both; `rotary` is of T + N tokens."""
        q = self._both(self.add_q_proj(text), self.to_q(x), self.norm_added_q, self.norm_q)
        k = self._both(self.add_k_proj(text), self.to_k(x), self.norm_added_k, self.norm_k)
        v = self._both(self.add_v_proj(text), self.to_v(x))
        if rotary is not None:
            q, k = rotated(q, rotary), rotated(k, rotary)
        out = attention(q, k, v) if self.control is None else controlled(q, k, v, self.control)
        of_text, of_image = out.flatten(2).split([text.shape[1], x.shape[1]], dim=1)
        return self.to_out[0](of_image), None if self.to_add_out is None else self.to_add_out(of_text)

    def _both(
        self, text: Tensor, image: Tensor, text_norm: nn.Module | None = None, image_norm: nn.Module | None = None
    ) -> Tensor:
        text, image = (y.unflatten(-1, (self.heads, -1)) for y in (text, image))
        if text_norm is not None and image_norm is not None:
            text, image = text_norm(text), image_norm(image)
        return torch.cat([text, image], dim=1)


class JointBlock(nn.Module):
    """Joint attention and a feed-forward for image and text, modulated by the conditioning vector (MM-DiT).

    `dual` adds self-attention of the image on a third modulation of the same norm (SD3.5 medium); the `last` block of
    SD3 leaves the text behind.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, dual: bool = False, last: bool = False) -> None:
        super().__init__()
        self.norm1 = Modulation(width, 9 if dual else 6)
        self.norm1_context = Modulation(width, 2 if last else 6)
        self.attn = JointAttention(width, heads, qk_norm=qk_norm, text_out=not last)
        self.attn2 = Attention(width, heads, qk_norm=qk_norm) if dual else None
        self.ff = FeedForward(width)
        self.ff_context = None if last else FeedForward(width)

    def forward(self, x: Tensor, text: Tensor, vector: Vector, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
        """Image (B, N, D) and text (B, T, D) under the activated vector (B, E); the last block gives text unchanged."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *third = self.norm1(vector)
        of_text = self.norm1_context(vector)
        text_scale, text_shift = of_text if self.ff_context is None else (of_text[1], of_text[0])
        own = norm_and_modulate(x, shift, scale)
        before = x
        added, text_added = self.attn(own, norm_and_modulate(text, text_shift, text_scale), rotary)
        x = torch.addcmul(x, gate, added)
        if self.attn2 is not None:
            x = torch.addcmul(x, third[2], self.attn2(norm_and_modulate(before, third[0], third[1])))
        x = bounded(torch.addcmul(x, ff_gate, self.ff(norm_and_modulate(x, ff_shift, ff_scale))))
        if self.ff_context is not None:
            text = torch.addcmul(text, of_text[2], text_added)
            hidden = self.ff_context(norm_and_modulate(text, of_text[3], of_text[4]))
            text = bounded(torch.addcmul(text, of_text[5], hidden))
        return x, text


class TextProjection(nn.Module):
    """Two linear layers with the tanh-GELU between them."""

    def __init__(self, text: int, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(text, width)
        self.linear_2 = Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class TimeTextEmbedding(nn.Module):
    """The conditioning vector: the time's embedding plus that of the pooled text and, with `guidance`, of its scale."""

    def __init__(self, width: int, pooled: int, *, guidance: bool = False) -> None:
        super().__init__()
        self.timestep_embedder = Embedding(TIME, width)
        self.text_embedder = Embedding(pooled, width)
        self.guidance_embedder = Embedding(TIME, width) if guidance else None

    def forward(self, t: Tensor, constant: Tensor) -> Tensor:
        """Times t (B,) or (1,) in 0 ... 1000 and what `constant` gave (B, E) -> (B, E), activated."""
        return F.silu(self.timestep_embedder(sinusoid(t.reshape(-1), TIME).to(constant.dtype)) + constant)

    def constant(self, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """What is the same at every time: of the pooled text (B, P) and the guidance scales (B,)."""
        out = self.text_embedder(pooled)
        if self.guidance_embedder is not None:
            assert guidance is not None
            out = out + self.guidance_embedder(sinusoid(1000 * guidance.reshape(-1).float(), TIME).to(pooled.dtype))
        return out
