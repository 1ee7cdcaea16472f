"""Compile a network by its blocks: equal blocks share one compilation, so that the start takes a fraction of the time.

This is torch's regional compilation, as diffusers' `compile_repeated_blocks` has it: torch.compile keeps what it made
by the code of a class's `forward`, and blocks of one class, of equal shapes and settings, pass the same guards. Beyond
it blocks of several widths share one compilation where nothing in them but the shapes tells the width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ldm.models.network import Network
from ldm.models.streaming import Call

Backend = str | Callable[..., Any]
_EACH = 8
"""Compilations of one block for which there is room: gradients or none, train or eval, precisions, sizes."""


def by_block(network: Network, backend: Backend = "inductor") -> int:
    """Compile the blocks that repeat, each at its first call for a size; how many kinds of them there are.

    In place; names of weights stay as they are, and copies of the network are not compiled. Blocks that occur once are
    left alone: each would take as long as a kind that occurs often. On the CPU blocks that differ in width alone are of
    one kind, where the network allows it. Raises ValueError where no block repeats.
    """
    undo(network)
    blocks = list(repeated_blocks(network))
    if not blocks:
        raise ValueError(f"compile 'blocks': no two blocks of this {network.title} are equal; compile it whole")
    _make_room(_EACH * len(blocks))
    any_width = _any_width(network)
    for block in blocks:
        call = torch.compile(block._call_impl, backend=backend, dynamic=network.compiled_sizes)
        _call_by(block, _of_any_width(call) if any_width else call)
    return len({kind(block, any_width) for block in blocks})


def undo(network: Network) -> None:
    """The blocks as they were before `by_block`."""
    for block in network.compiled_blocks():
        _call_by(block, None)


def _call_by(block: nn.Module, compiled: Callable[..., Any] | None) -> None:
    """As `nn.Module.compile` does it; a block that comes and goes is fetched before, outside of what is compiled."""
    call: Any = block._compiled_call_impl
    if isinstance(call, Call):
        call.inner = compiled
    else:
        block._compiled_call_impl = compiled  # type: ignore[assignment]


def _any_width(network: Network) -> bool:
    """On a GPU a kernel for one width is the quicker one."""
    return network.compiled_widths and network.runs_on(next(network.parameters())).type in ("cpu", "meta")


def _of_any_width(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The call whose weights' sizes are variables, as those of its arguments are; other compilations stay as they are.

    Torch reads how it shall compile when it does, which is inside of some call.
    """
    import torch._dynamo

    sizes: Any = torch._dynamo.config

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a part of something larger, which goes by its own settings
            return compiled(*args, **kwargs)
        with sizes.patch(force_parameter_static_shapes=False, force_nn_module_property_static_shapes=False):
            return compiled(*args, **kwargs)

    return call


def repeated_blocks(network: Network) -> Iterator[nn.Module]:
    """Those of which there is another of the same kind."""
    blocks, any_width = list(network.compiled_blocks()), _any_width(network)
    count = Counter(kind(block, any_width) for block in blocks)
    yield from (block for block in blocks if count[kind(block, any_width)] > 1)


def kind(block: nn.Module, any_width: bool = False) -> tuple[object, ...]:
    """Equal for blocks of one class with the same weights but for their values, and for their sizes if told so."""
    named = [*block.named_parameters(), *block.named_buffers()]
    shapes = [value.ndim if any_width else tuple(value.shape) for _, value in named]
    told = ((name, shape, v.dtype, v.requires_grad) for (name, v), shape in zip(named, shapes, strict=True))
    return type(block), *told


def _make_room(count: int) -> None:
    """Torch gives up on code that it has compiled 8 times; here that is a class of blocks of many shapes."""
    import torch._dynamo

    config: Any = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, count)
    config.accumulated_cache_size_limit = max(config.accumulated_cache_size_limit, 4 * count)
