"""A training step on the meta device: what each operator computes and moves, and how much memory lives when.

Nothing is computed or allocated; the figures are those of the operators that a real step would run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ldm.models.casts import planned


@dataclass(frozen=True)
class Op:
    """One kernel: floating-point operations (2 a multiply-add; 0 where memory bounds it) and bytes read and written."""

    flops: float
    bytes: float
    backward: bool


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A forward and backward pass over `batch` samples.

    `peak` is the most that lives at once in bytes, without weights, inputs and gradients of weights that were handed
    on; `peak_kept` with those gradients kept to the end.
    """

    batch: int
    ops: tuple[Op, ...]
    peak: int
    peak_kept: int
    gradients: int


class _Tracker(TorchDispatchMode):
    """Sees every operator: counts it, and follows the life of each storage that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.live = self.peak = self.peak_kept = self.handed_on = 0
        self.backward = False
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # Draws and indices on the host are neither kernels of the device nor in its memory.
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_meta]
        storages = {x.untyped_storage()._cdata for x in inputs}
        fresh = [x for x in outputs if x.untyped_storage()._cdata not in storages]
        for x in fresh:
            self.follow(x)
        if fresh or (outputs and func._schema.is_mutable):
            count = flop_registry.get(func._overloadpacket)
            flops = 0 if count is None else count(*args, **kwargs, out_val=out)
            empty = func._overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like)
            if not empty:
                self.ran(flops, sum(map(_bytes, inputs)) + sum(map(_bytes, fresh)))
        return out

    def ran(self, flops: float, moved: float) -> None:
        """A kernel ran."""
        self.ops.append(Op(float(flops), float(moved), self.backward))

    def follow(self, x: Tensor) -> None:
        """Count a new tensor's storage until it dies."""
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = size
        weakref.finalize(storage, self._forget, key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_kept = max(self.peak_kept, self.live + self.handed_on)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)


def _bytes(x: Tensor) -> int:
    """What a kernel moves of a tensor; a broadcast one is read once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class _Fused(torch.autograd.Function):
    """Attention as a fused kernel: keeps its inputs, its output and a sum for each row, not the weights.

    A mask is kept as it is given, without a gradient; a boolean one in the type of the queries.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tracker: _Tracker) -> Tensor:
        out = torch.empty_like(q)
        ctx.tracker, ctx.products = tracker, 2 * q.numel() * k.shape[-2]
        added = [] if mask is None else [mask.to(q.dtype)]
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32), *added)
        tracker.ran(2 * ctx.products, sum(map(_bytes, (q, k, v, out))))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        ctx.tracker.ran(5 * ctx.products, 2 * sum(map(_bytes, (q, k, v, grads[0]))))
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


_LOWER = {torch.conv2d, torch.conv1d, F.linear, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm, Tensor.matmul}
_LOWER |= {Tensor.__matmul__, F.scaled_dot_product_attention}
_FLOAT = {F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.mse_loss, Tensor.pow, torch.pow}
_FLOAT |= {F.cross_entropy, F.cosine_similarity, torch.exp, Tensor.exp, torch.native_layer_norm}
_WIDEST = {torch.addcmul, Tensor.addcmul}


def _fusible(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **_: Any
) -> bool:
    """Whether a fused kernel takes it; others form the weights."""
    return not dropout_p and (attn_mask is None or not attn_mask.requires_grad)


class _Gpu(TorchFunctionMode):
    """What a GPU's autocast and fused attention would do (PyTorch's lists of operators for CUDA), on any tensor."""

    def __init__(self, tracker: _Tracker, lower: torch.dtype) -> None:
        super().__init__()
        self._tracker, self._lower = tracker, lower
        self._cast: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._lower != torch.float32 and func in _LOWER:
            args = [self._to(x, self._lower) for x in args]
            kwargs = {k: self._to(x, self._lower) for k, x in kwargs.items()}
        elif self._lower != torch.float32 and func in _FLOAT:
            args = [self._to(x, torch.float32) for x in args]
        elif self._lower != torch.float32 and func in _WIDEST:
            widest = max((x.dtype for x in args if isinstance(x, Tensor)), key=lambda dtype: dtype.itemsize)
            args = [self._to(x, widest) for x in args]
        if func is F.scaled_dot_product_attention and _fusible(*args, **kwargs):
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            return _Fused.apply(*args[:3], mask, self._tracker)
        return func(*args, **kwargs)

    def _to(self, x: Any, dtype: torch.dtype) -> Any:
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.dtype != dtype):
            return x
        if not (x.is_leaf and x.requires_grad and torch.is_grad_enabled()):  # a cast without a gradient serves no other
            return x.to(dtype)
        if self._tracker.backward:  # what is computed again has an autocast of its own, which ends with it
            return x.to(dtype)
        if id(x) not in self._cast:  # autocast casts a weight once a forward pass
            self._cast[id(x)] = x.to(dtype)
        return self._cast[id(x)]

    def forget(self) -> None:
        """The end of the forward pass: autocast drops its cast weights; autograd keeps those it needs."""
        self._cast.clear()


@contextmanager
def _plain() -> Iterator[None]:
    """What the CPU engine does: attention as products."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def without_gradients(call: Callable[[], Any], batch: int, *, precision: torch.dtype, gpu: bool) -> Trace:
    """Run `call()` on meta tensors, as `trace` does; what it answers lives to the end."""
    tracker = _Tracker()
    with torch.no_grad(), tracker, _Gpu(tracker, precision) if gpu else _plain():
        call()
    return Trace(batch=batch, ops=tuple(tracker.ops), peak=tracker.peak, peak_kept=tracker.peak, gradients=0)


def trace(
    module: nn.Module, inputs: Callable[[int], tuple[Any, ...]], batch: int, *, precision: torch.dtype, gpu: bool
) -> Trace:
    """Run `mean(module(*inputs(batch))²)` forward and backward on the meta device, where all weights must be.

    With `gpu`, attention is fused and `precision` is autocast's by the rules of CUDA; without, both are the CPU's in
    float32.
    """
    given = inputs(batch)
    tracker = _Tracker()
    trained = [p for p in module.parameters() if p.requires_grad]

    def hand_on(p: Tensor) -> None:
        assert p.grad is not None
        tracker.handed_on += p.grad.untyped_storage().nbytes()
        p.grad = None

    hooks = [p.register_post_accumulate_grad_hook(hand_on) for p in trained]
    with ExitStack() as stack:
        stack.enter_context(tracker)
        device = stack.enter_context(_Gpu(tracker, precision)) if gpu else None
        stack.enter_context(planned(precision if gpu else torch.float32))
        if not gpu:
            stack.enter_context(_plain())
        out = module(*given)
        loss = (out.float() ** 2).mean()
        if device is not None:
            device.forget()
        del out
        tracker.backward = True
        # loss.backward() is a function that modes see as one: what is recomputed inside of it would escape them.
        Variable._execution_engine.run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    for hook in hooks:
        hook.remove()
    return Trace(
        batch=batch,
        ops=tuple(tracker.ops),
        peak=tracker.peak,
        peak_kept=tracker.peak_kept,
        gradients=tracker.handed_on,
    )
