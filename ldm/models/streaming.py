"""Blocks of a frozen network that come and go: N of them are on the device, the others in the host's memory.

A block is fetched before it runs, forward and backward, and the next one while it runs. Its weights do not change, so
that nothing is written back when it leaves. Answers and gradients are those of the whole network on the device, bit by
bit. Legend: B blocks of the network, N on the device at once, the one that is being fetched included.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ldm.models.moving import Arriving, Mover, mover
from ldm.models.network import RUN, Network, Run

ALIGNED = 256
"""Bytes; tensors of a block begin at multiples, as those that an allocator gives do: kernels choose by it."""


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
    network.streaming = Streaming(network, count, by or mover(torch.device(device)))
    return network.streaming


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
    """A parameter or buffer, where it is in its block's bytes, and its number of changes when it arrived."""

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
    """What autograd keeps of a weight for the backward pass instead of its memory."""

    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

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
    inner: Callable[..., Any] | None = field(default=None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run, block = self.inner or self.block.module._call_impl, self.block
        again = RUN.now == Run.AGAIN
        self.streaming.need(block, Way.AGAIN if again else Way.FORWARD)
        if not torch.is_grad_enabled() or again:
            return run(*args, **kwargs)
        if RUN.now == Run.FIRST:  # nothing inside is kept for the backward pass
            out = run(*args, **kwargs)
        else:
            with saved_tensors_hooks(self._pack, self._unpack):
                out = run(*args, **kwargs)
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, Tensor) and value.requires_grad and not any(value is a for a in args):
                value.register_hook(self._back)
        return out

    def _back(self, _: Tensor) -> None:
        """The backward pass comes to the block."""
        self.streaming.need(self.block, Way.BACK)

    def _pack(self, value: Tensor) -> Tensor | _Saved:
        flat = self.streaming.bytes_of(self.block)
        if type(value) not in (Tensor, nn.Parameter) or value.device != flat.device:
            return value
        if value.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
            return value
        return _Saved(value.data_ptr() - flat.data_ptr(), value.shape, value.stride(), value.dtype)

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self.streaming.need(self.block, Way.BACK)
        flat = self.streaming.bytes_of(self.block)
        return flat[saved.offset : saved.offset + saved.bytes].view(saved.dtype).as_strided(saved.size, saved.stride)


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
                one.arriving = self._by.fetch(one.host)
            if one is block:
                self._arrive(one)

    def bytes_of(self, block: _Block) -> Tensor:
        """Those of a block that is on the device."""
        assert block.arriving is not None and block.here
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

    def _arrive(self, block: _Block) -> None:
        if block.here:
            return
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
            weight.version = tensor._version
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


def _view(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor of the shape, type and order in memory of another one, in bytes from an offset on."""
    numbers = flat[offset : offset + like.numel() * like.element_size()].view(like.dtype)
    dense = 1 + sum((size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True)) == like.numel()
    return numbers.as_strided(like.shape, like.stride()) if dense else numbers.view(like.shape)
