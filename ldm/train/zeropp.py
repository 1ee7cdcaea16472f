"""ZeRO++ (Wang et al. 2023, arXiv 2306.10209) on DeepSpeed: what can run here, and where its own kernels need help.

hpZ needs none. Quantised weights are DeepSpeed's: 8 bits a value, one scale for up to 16,000, through half precision.
Quantised gradients are its kernels too, but they read half precision whatever they are given, and add up within a node
where everything else takes the mean; `Reduce` stands around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm import dist
from ldm.train.engine_config import EngineConfig

_LARGE = 10_000
"""Parameters up to this many elements are whole on every rank (`stage3_param_persistence_threshold`)."""
_TOP = 2.0**10
"""To which gradients are scaled: a node's sum of them is far from 65504, the end of half precision."""
_GROUPS = range(1024, 63, -8)
"""How many values share a scale, the most that fit: loads of the kernels are of 8."""


def gpus() -> bool:
    """Whether quantised collectives can run: DeepSpeed has their kernels for CUDA alone."""
    return torch.cuda.is_available()


def check(config: EngineConfig) -> None:
    """Raise ValueError for what of ZeRO++ these processes cannot run."""
    world, part = dist.world_size(), config.hpz_partition
    if 1 < part < world and world % part:
        allowed = ", ".join(str(n) for n in range(1, world) if world % n == 0)
        raise ValueError(
            f"train.engine.hpz_partition: {part} does not divide {world} processes; allowed are {allowed}"
            f" (1 is off), and a node has {dist.local_world_size()}"
        )
    for key in ("quantized_weights", "quantized_gradients"):
        if world > 1 and getattr(config, key) and not gpus():
            raise ValueError(f"train.engine.{key}: DeepSpeed quantises on GPUs alone; false is allowed on the CPU")


def tell(config: EngineConfig) -> None:
    """Say where hpZ has no effect here, or not the one that it is for."""
    world, node, part = dist.world_size(), dist.local_world_size(), config.hpz_partition
    if 1 < world <= part:
        dist.say(f"train.engine.hpz_partition: {part} is off, as {world} processes are no more than one group")
    elif 1 < part < world and node % part:
        dist.say(f"train.engine.hpz_partition: groups of {part} span nodes, which have {node} processes each")


def prepare(deepspeed: Any, module: nn.Module, config: EngineConfig) -> None:
    """Before the engine is made. Raises ValueError where weights cannot be quantised, or kernels fail."""
    # DeepSpeed makes the groups of hpZ once a process and refuses to make others.
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    if not (config.quantized_weights or config.quantized_gradients):
        return
    try:
        quantizer = deepspeed.runtime.zero.partition_parameters.CUDAQuantizer()
    except Exception as error:  # of a compiler, in many kinds
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"train.engine: quantised collectives need DeepSpeed's kernels, and nvcc: {why}") from error
    if config.quantized_weights:
        check_sizes(module, dist.world_size())
        _probe("quantized_weights", *_weights(quantizer))
    if config.quantized_gradients:
        _prepare_gradients(deepspeed, quantizer)


def check_sizes(module: nn.Module, world: int) -> None:
    """Raise ValueError for a divided parameter whose shards are padded or are no whole number of 8 values."""
    for name, p in module.named_parameters():
        if p.numel() > _LARGE and p.numel() % (8 * world):
            raise ValueError(
                f"train.engine.quantized_weights: {name} has {p.numel():,} values, which {world} processes do not"
                " divide into multiples of 8; use another number of processes, or false"
            )


def gather_small_exactly(deepspeed: Any, module: nn.Module) -> None:
    """Once the engine is made: parameters that are whole between steps are not quantised when they are gathered anew.

    Their shards are often no multiples of 8 values, of which DeepSpeed cannot quantise even a whole bucket.
    """
    several = deepspeed.runtime.zero.partition_parameters.MultipleAllGatherHandles
    for p in module.parameters():
        p.all_gather_coalesced = partial(_gather, p.all_gather_coalesced, several)  # type: ignore[attr-defined]


def _gather(
    theirs: Callable[..., Any],
    several: Callable[..., Any],
    params: Iterable[Any],
    safe_mode: bool = False,
    quantize: bool = False,
) -> Any:
    params = list(params)
    if not quantize:
        return theirs(params, safe_mode=safe_mode)
    parts = {False: [p for p in params if p.ds_persist], True: [p for p in params if not p.ds_persist]}
    return several([theirs(part, safe_mode=safe_mode, quantize=large) for large, part in parts.items() if part])


def _prepare_gradients(deepspeed: Any, quantizer: Any) -> None:
    node, world = deepspeed.accelerator.get_accelerator().device_count(), dist.world_size()
    if world <= node:
        dist.say(
            f"train.engine.quantized_gradients: off, as {world} processes are no more than one node of {node} GPUs"
        )
        return
    if world % node:
        raise ValueError(f"train.engine.quantized_gradients: nodes of {node} GPUs do not divide {world} processes")
    collectives, stage3 = deepspeed.runtime.comm.coalesced_collectives, deepspeed.runtime.zero.stage3
    collectives.quantizer_module = quantizer.quantizer_cuda_module
    reduce = Reduce(collectives.all_to_all_quant_reduce, collectives.reduce_scatter_coalesced, node, world)
    stage3.all_to_all_quant_reduce = reduce
    _probe("quantized_gradients", *_gradients(reduce, deepspeed.utils.groups._get_local_all_to_all_group()))


class Reduce:
    """Mean gradients, each rank its shard: 4 bits a value within nodes, and again between them.

    `quantised` is DeepSpeed's reduction of half-precision values in nodes of `node` ranks, `plain` its exact one, for
    vectors and what does not divide. All ranks scale a gradient alike, by a power of two. What is not finite on one
    rank is NaN on all, as 4 bits would hide it.
    """

    def __init__(self, quantised: Callable[..., Any], plain: Callable[..., Any], node: int, world: int) -> None:
        self._quantised, self._plain, self._node, self._world = quantised, plain, node, world

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor], groups: Mapping[str, Any]) -> list[Tensor]:
        large = [i for i, t in enumerate(tensors) if t.ndim > 1 and rows(t.numel(), self._world)]
        scales = dict(zip(large, self._scales([tensors[i] for i in large]), strict=True)) if large else {}
        return [self._one(t, scales[i], groups) if i in scales else self._plain([t])[0] for i, t in enumerate(tensors)]

    def _scales(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        top = torch.stack([t.abs().amax().float() for t in tensors])
        top = torch.where(top.isfinite(), top, torch.inf)  # a maximum over ranks may lose NaN
        torch.distributed.all_reduce(top, op=torch.distributed.ReduceOp.MAX)
        fit = torch.exp2((_TOP / top).log2().floor().clamp(-126, 126))  # 0 has the largest, and stays 0
        return list(torch.where(top.isfinite(), fit, torch.nan))

    def _one(self, tensor: Tensor, scale: Tensor, groups: Mapping[str, Any]) -> Tensor:
        half = (tensor.float() * scale).half().reshape(rows(tensor.numel(), self._world), -1)
        total = self._quantised([half], groups)[0]  # the mean over nodes of their sums
        return (total.float() / self._node / scale).to(tensor.dtype)


@cache
def rows(numel: int, world: int) -> int:
    """In how many groups the values of a gradient are quantised, each rank the same number; 0: not at all.

    Groups are not larger than their number, which is what DeepSpeed takes from the shape.
    """
    fits = (numel // size for size in _GROUPS if numel % (size * world) == 0 and size * size <= numel)
    return next(fits, 0)


def _weights(quantizer: Any) -> tuple[Tensor, Tensor]:
    """Known values, and the same through 8 bits."""
    values = torch.linspace(-1, 1, 4096, device=dist.device())
    return values, quantizer.dequantize(*quantizer.quantize(values), dtype=torch.float32)


def _gradients(reduce: Reduce, groups: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """This rank's shard of known values' mean, and the same through 4 bits."""
    world, rank = dist.world_size(), dist.rank()
    values = torch.sin(torch.arange(64 * 64 * world, device=dist.device()) * 0.37)
    given = values * (2 * (rank + 1) / (world + 1))  # whose mean over ranks is `values`
    return values.chunk(world)[rank], reduce([given.view(64, -1)], groups)[0].reshape(-1)


def _probe(key: str, exact: Tensor, got: Tensor) -> None:
    """Raise ValueError, on all ranks, where quantised values are off by more than their bits allow."""
    off = float((got.float() - exact).norm() / exact.norm())
    if dist.any_rank(not off < {"quantized_weights": 0.02, "quantized_gradients": 0.3}[key]):
        raise ValueError(f"train.engine.{key}: DeepSpeed's kernels are off by {off:.2g} of the values here; use false")
