"""Which image tokens go through a transformer's middle while it trains, and which around it (TREAD, arXiv 2501.04765).

Legend: B batch, N image tokens, K of them that stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ldm.models.transformers.base import Transformer
from ldm.models.transformers.routing import Span
from ldm.rng import Rng


@dataclass(frozen=True, kw_only=True)
class RouteOptions:
    """Of a picture's tokens a part `keep` goes through blocks `first` to `last`, the others wait before the next.

    Each sample's tokens are drawn anew at every step. From optimizer step `until` on (0: never) all go through: what is
    drawn has all of them, and a short end of training with all is usual.
    """

    first: int
    last: int
    keep: float = 0.5
    until: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ValueError(f"first {self.first} and last {self.last}: expected 0 <= first <= last, numbers of blocks")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must lie between 0 and 1, got {self.keep}")
        if self.until < 0:
            raise ValueError(f"until must be at least 0 steps (0: never), got {self.until}")


def set_span(network: nn.Module, options: RouteOptions, aligned: str | None = None) -> None:
    """Tell the network its span.

    Raises ValueError for one without tokens or without these blocks, or for features that are `aligned` where some
    tokens are led around.
    """
    if not isinstance(network, Transformer):
        title = getattr(network, "title", type(network).__name__)
        raise ValueError(f"options.route: leads a transformer's tokens, and the {title} has none; write null")
    if options.last >= network.depth:
        raise ValueError(f"options.route.last: {options.last}, but blocks are numbered 0 to {network.depth - 1}")
    if aligned is not None and options.first <= int(aligned) < options.last:
        raise ValueError(
            f"options.align.layer: {aligned} is within options.route's blocks {options.first} to {options.last}, where "
            "tokens are missing; align before them or from the last one on"
        )
    network.routing = Span(options.first, options.last)


def kept(options: RouteOptions, rng: Rng, tokens: int, step: int) -> Tensor | None:
    """Ascending numbers (B, K) of the tokens that stay, K at least 1; None where all do."""
    if options.until and step >= options.until:
        return None
    count = max(1, round(options.keep * tokens))
    return rng.uniform("route", (tokens,)).argsort(dim=1)[:, :count].sort(dim=1).values
