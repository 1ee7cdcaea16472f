"""Blocks of a frozen network that come and go: N of them are on the device, the others in the host's memory.

A block is fetched before it runs, forward and backward, and the next one while it runs. Its weights do not change, so
that nothing is written back when it leaves. Answers and gradients are those of the whole network on the device, bit by
bit. Legend: B blocks of the network, N on the device at once, the one that is being fetched included.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.models.keeping import keeping
from ldm.models.moving import Arriving, Mover, mover
from ldm.models.network import Network
from ldm.models.recomputing import RUN, Run

ALIGNED = 256
"""Bytes; tensors of a block begin at multiples, as those that an allocator gives do: kernels choose by it."""

PRODUCTS = (F.linear, F.conv2d)
"""What autocast casts weights for, each the second of the arguments."""


def resident(blocks: int, count: int) -> list[int]:
    """Which of so many blocks stay where `count` may be on the device: all but two of these, spread evenly.

    The others come and go through the two places left, or through one where `count` is 1.
    """
    if count >= blocks:
        return list(range(blocks))
    stay = max(0, count - 2)
    return [(2 * i + 1) * blocks // (2 * stay) for i in range(stay)]


def check_count(count: int | None, key: str = "blocks_on_device") -> None:
    """Raise ValueError unless it is at least 1, or None."""
    if count is not None and (not isinstance(count, int) or count < 1):
        raise ValueError(f"{key} must be at least 1, or null for all, got {count!r}")


def stream(network: Network, count: int, device: str | torch.device, by: Mover | None = None) -> Streaming:
    """Keep `count` of the network's blocks on the device at once, and what is in no block; in place.

    Parameters that train stay on the device. Raises ValueError for a count below 1, and for tensors of other kinds
    than torch's own.
    """
    check_count(count)
    stop(network)
    made = network.streaming = Streaming(network, count, by or mover(torch.device(device)))
    return made


def stop(network: Network) -> None:
    """The network as it was before `stream`; blocks that come and go are in the host's memory then."""
    if network.streaming is not None:
        network.streaming.stop()
        network.streaming = None


class Way(enum.Enum):
    """Why a block is needed: it runs, it runs again for the backward pass, or the backward pass goes through it."""

    FORWARD = 0
    AGAIN = 1
    BACK = 2


@dataclass(eq=False)
class _Weight:
    """A parameter or buffer, where it is in its block's bytes, and its number of changes when these were sent."""

    tensor: Tensor
    host: Tensor
    away: Tensor
    offset: int
    version: int = 0

    def on(self, flat: Tensor) -> Tensor:
        """It in a copy of the block's bytes."""
        return _view(flat, self.offset, self.host)


@dataclass(eq=False)
class _Block:
    """A block that comes and goes; `arriving` from when its copy is asked for, `here` from when it may be used."""

    index: int
    name: str
    module: nn.Module
    weights: list[_Weight]
    host: Tensor
    arriving: Arriving | None = None
    here: bool = False


@dataclass(frozen=True)
class _Saved:
    """What autograd keeps of a weight for the backward pass instead of its memory.

    `cast`: it keeps this view, (type, shape, steps, first), of the weight in another type.
    """

    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    cast: tuple[torch.dtype, torch.Size, tuple[int, ...], int] | None = None

    @property
    def bytes(self) -> int:
        """From the first to the last of its numbers."""
        steps = (max(0, size - 1) * step for size, step in zip(self.size, self.stride, strict=True))
        return (1 + sum(steps)) * self.dtype.itemsize


@dataclass(eq=False)
class Call:
    """Runs a block, after its weights have come; stands where torch's compiled calls do, around one if there is one."""

    streaming: Streaming
    block: _Block
    inner: Callable[..., Any] | None = None
    _cast: tuple[Tensor, _Saved] | None = field(default=None, init=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run, block = self.inner or self.block.module._call_impl, self.block
        again = RUN.now == Run.AGAIN
        self.streaming.need(block, Way.AGAIN if again else Way.FORWARD)
        if not torch.is_grad_enabled() or again:
            return run(*args, **kwargs)
        if RUN.now == Run.FIRST:  # nothing inside is kept for the backward pass
            out = run(*args, **kwargs)
        else:
            with keeping(self._keep), _Casts(self) if self.inner is None else nullcontext():
                out = run(*args, **kwargs)
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, Tensor) and value.requires_grad and not any(value is a for a in args):
                value.register_hook(self._back)
        return out

    def _back(self, _: Tensor) -> None:
        """The backward pass comes to the block."""
        self.streaming.need(self.block, Way.BACK)

    def product(self, run: Callable[..., Any], x: Any, weight: Any, *rest: Any, **options: Any) -> Any:
        """A product under autocast, which casts the block's weight: what autograd keeps of the cast is the weight."""
        saved = self._saved(weight) if isinstance(weight, Tensor) and weight.dtype == torch.float32 else None
        kind = self.streaming.device.type
        if saved is None or not torch.is_autocast_enabled(kind):
            return run(x, weight, *rest, **options)
        cast = weight.to(torch.get_autocast_dtype(kind))
        self._cast = cast, saved
        try:
            return run(x, cast, *rest, **options)
        finally:
            self._cast = None  # its memory may be another tensor's from now on

    def _saved(self, value: Tensor) -> _Saved | None:
        """Where in the block's bytes a tensor is; None for others."""
        flat = self.streaming.bytes_of(self.block)
        if type(value) not in (Tensor, nn.Parameter) or not _same_memory(value, flat):
            return None
        return _Saved(value.data_ptr() - flat.data_ptr(), value.shape, value.stride(), value.dtype)

    def _keep(self, value: Tensor) -> Callable[[], Tensor] | None:
        saved = self._saved(value)
        if saved is None and self._cast is not None and _same_memory(value, self._cast[0]):
            view = value.dtype, value.shape, value.stride(), value.storage_offset()
            saved = replace(self._cast[1], cast=view)
        return None if saved is None else partial(self._again, saved)

    def _again(self, saved: _Saved) -> Tensor:
        """What was saved, fetched again where it has left."""
        self.streaming.need(self.block, Way.BACK)
        flat = self.streaming.bytes_of(self.block)
        found = flat[saved.offset : saved.offset + saved.bytes].view(saved.dtype).as_strided(saved.size, saved.stride)
        if saved.cast is None:
            return found
        dtype, size, stride, first = saved.cast
        return found.to(dtype).as_strided(size, stride, first)


class _Casts(TorchFunctionMode):
    """Inside, products go through a block's `Call.product`."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = partial(self._call.product, func) if func in PRODUCTS and len(args) > 1 else func
        return run(*args, **(kwargs or {}))


class Streaming:
    """What is on the device, what comes next. Which block follows which is learned from how the network is called."""

    def __init__(self, network: Network, count: int, by: Mover) -> None:
        self.count, self.device, self._by = count, by.device, by
        blocks = list(network.blocks())
        stay = {blocks[i][0] for i in resident(len(blocks), count)}
        moving = [(name, block) for name, block in blocks if name not in stay]
        self._places = min(2, count)
        own = _owned(moving)
        _check_kinds(own)
        _place_rest(network, {id(t) for tensors in own for _, t in tensors}, self.device)
        self._blocks = [
            self._packed(i, name, block, [t for _, t in tensors])
            for i, ((name, block), tensors) in enumerate(zip(moving, own, strict=True))
        ]
        self._of = {module: block for block in self._blocks for module in block.module.modules()}
        self._after = {(i, Way.FORWARD): (i + 1) % len(moving) for i in range(len(moving))}
        self._after |= {(i, way): max(0, i - 1) for i in range(len(moving)) for way in (Way.AGAIN, Way.BACK)}
        self._now: tuple[int, Way] | None = None
        for block in self._blocks:
            block.module._compiled_call_impl = Call(self, block, block.module._compiled_call_impl)  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a network is not streamed: its weights are where they were at the moment."""

    @property
    def held(self) -> list[str]:
        """Names of those of the moving blocks that are on the device, or on their way."""
        return [block.name for block in self._held()]

    @property
    def moving(self) -> list[str]:
        """Names of the blocks that come and go."""
        return [block.name for block in self._blocks]

    def fetch(self, module: nn.Module) -> None:
        """Before a module inside of a block is used without a call of the block."""
        block = self._of.get(module)
        if block is not None:
            self.need(block, Way.FORWARD)

    def need(self, block: _Block, way: Way) -> None:
        """The block on the device, ready to be used, and the one that follows it on its way."""
        key = (block.index, way)
        if block.here and key == self._now:
            return
        if self._now is not None:
            self._after[self._now] = block.index
        self._now = key
        following = self._blocks[self._after[key]]
        wanted = [block] if self._places == 1 or following is block else [block, following]
        held = self._held()
        room = self._places - len(held) - sum(one.arriving is None for one in wanted)
        for other in [one for one in held if one not in wanted][: max(0, -room)]:
            self._leave(other)
        for one in wanted:
            if one.arriving is None:
                self._send(one)
            if one is block:
                self._arrive(one)

    def bytes_of(self, block: _Block) -> Tensor:
        """Those of a block that is on the device."""
        assert block.here
        assert block.arriving is not None
        return block.arriving.flat

    def stop(self) -> None:
        """All moving blocks to the host's memory, where they stay."""
        for block in self._held():
            self._leave(block)
        self._by.finish()
        for block in self._blocks:
            call: Any = block.module._compiled_call_impl
            if isinstance(call, Call):
                block.module._compiled_call_impl = call.inner  # type: ignore[assignment]
            for weight in block.weights:
                weight.tensor.data = weight.host

    def _held(self) -> list[_Block]:
        return [block for block in self._blocks if block.arriving is not None]

    def _packed(self, index: int, name: str, module: nn.Module, tensors: list[Tensor]) -> _Block:
        """The block with its tensors in one piece of the host's memory."""
        offsets, total = [], 0
        for tensor in tensors:
            offsets.append(total)
            total += math.ceil(tensor.numel() * tensor.element_size() / ALIGNED) * ALIGNED
        flat, weights = self._by.host(total), []
        for tensor, offset in zip(tensors, offsets, strict=True):
            host = _view(flat, offset, tensor.data)
            host.copy_(tensor.data)
            weights.append(_Weight(tensor, host, self._by.away(host), offset))
            tensor.data = weights[-1].away
        return _Block(index, name, module, weights, flat)

    def _send(self, block: _Block) -> None:
        block.arriving = self._by.fetch(block.host)
        for weight in block.weights:
            weight.version = weight.tensor._version

    def _arrive(self, block: _Block) -> None:
        if block.here:
            return
        if any(weight.tensor._version != weight.version for weight in block.weights):  # changed on its way
            self._leave(block)
            self._send(block)
        assert block.arriving is not None
        self._by.wait(block.arriving)
        for weight in block.weights:
            tensor = weight.tensor
            if tensor.requires_grad or tensor.data_ptr() != weight.away.data_ptr() or tensor.shape != weight.away.shape:
                raise ValueError(
                    f"blocks_on_device: weights of {block.name} were moved, replaced or set to train while the block "
                    "was away; stop streaming before (a pipeline's `to` does)"
                )
            tensor.data = weight.on(block.arriving.flat)
        block.here = True

    def _leave(self, block: _Block) -> None:
        assert block.arriving is not None
        if not block.here:
            self._by.wait(block.arriving)  # its memory goes back to the stream that computes
        for weight in block.weights if block.here else ():
            if weight.tensor._version != weight.version:  # written into while it was here: a LoRA was merged, say
                weight.host.copy_(weight.tensor.data)
            weight.tensor.data = weight.away
        block.arriving, block.here = None, False


def _owned(blocks: Iterable[tuple[str, nn.Module]]) -> list[list[tuple[str, Tensor]]]:
    """Of each block, by name, what comes and goes with it: not what trains, nor what two blocks share."""
    found = [list(_frozen(name, block)) for name, block in blocks]
    count: dict[int, int] = {}
    for tensors in found:
        for _, tensor in tensors:
            count[id(tensor)] = count.get(id(tensor), 0) + 1
    return [[(name, t) for name, t in tensors if count[id(t)] == 1] for tensors in found]


def _frozen(name: str, block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for own, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if not tensor.requires_grad and tensor.numel():
            yield f"{name}.{own}", tensor


def _check_kinds(own: Iterable[Iterable[tuple[str, Tensor]]]) -> None:
    for name, tensor in (pair for tensors in own for pair in tensors):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise ValueError(
                f"blocks_on_device: {name} is a {type(tensor).__name__}, which cannot be fetched by its bytes; allowed "
                "are parameters and buffers that are plain tensors; write null"
            )


def _place_rest(network: Network, moving: set[int], device: torch.device) -> None:
    """All others on the device, each as it is."""
    for tensor in [*network.parameters(), *network.buffers()]:
        if id(tensor) not in moving:
            tensor.data = tensor.data.to(device)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _view(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor of the shape, type and order in memory of another one, in bytes from an offset on."""
    numbers = flat[offset : offset + like.numel() * like.element_size()].view(like.dtype)
    dense = 1 + sum((size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True)) == like.numel()
    return numbers.as_strided(like.shape, like.stride()) if dense else numbers.view(like.shape)
