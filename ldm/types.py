"""Aliases that every room shares. Legend: B batch, C channels, H height, W width, T tokens, D features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Cond = dict[str, Tensor]
"""Conditioning: "text" (B, T, D), "pooled" (B, P), "time_ids" (B, 6), "concat" (B, C', H, W), "class" (B,).

"copies" (n, 0) is told by its shape alone: the B rows of x, t and all but the text are n times the same.
"""

Net = Callable[[Tensor, Tensor, Cond], Tensor]
"""(x (B, C, H, W), t (B,), cond) -> the network's raw output (B, C', H, W)."""

Denoise = Callable[[Tensor, Tensor, Cond], Tensor]
"""(x (B, C, H, W), t (B,), cond) -> estimate of x_0 (B, C, H, W)."""

Batch = dict[str, Any]
"""What the loader gives: tensors with a leading batch axis, lists of strings, and "position" (B,) int64."""

Metrics = dict[str, Tensor]
"""Named scalars of one micro-batch, detached, averaged over ranks by the trainer."""
