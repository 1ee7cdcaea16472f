"""What autograd keeps for the backward pass in the place of a tensor: torch's hooks on saved tensors, one in another.

Of torch's own hooks the innermost alone is asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Keep = Callable[[Tensor], Callable[[], Tensor] | None]
"""A tensor -> what gives it again in the backward pass; None for a tensor that is kept itself."""


class _Inside(threading.local):
    def __init__(self) -> None:
        self.keep: tuple[Keep, ...] = ()


_INSIDE = _Inside()


@contextmanager
def keeping(keep: Keep) -> Iterator[None]:
    """Inside, what `keep` gives is kept instead of tensors that it knows; for others those outside of it are asked."""
    before = _INSIDE.keep
    _INSIDE.keep = every = (keep, *before)

    def pack(value: Tensor) -> Tensor | Callable[[], Tensor]:
        again = next((found for one in every if (found := one(value)) is not None), None)
        return value.detach() if again is None else again  # an output that keeps itself is never freed

    try:
        with saved_tensors_hooks(pack, _unpack):
            yield
    finally:
        _INSIDE.keep = before


def _unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()
