"""ZeRO 3 on CPUs: what DeepSpeed does for each of many small tensors in turn, done once for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from ldm import dist
from ldm.train.engine_config import EngineConfig


def lighten(optimizer: Any, module: nn.Module, config: EngineConfig) -> None:
    """Once the engine is made. Changes no weight and no byte on the wire; the norm in its last bits of float64."""
    small = optimizer.persistent_parameters
    if small and config.hpz_partition == 1:  # hpZ's copies are of the weights before the step at that moment
        small[0].all_gather = partial(_gather, small[0].all_gather, small[0].all_gather_coalesced)
    if config.precision != "fp16":
        optimizer.get_grad_norm_direct = norm
    for part in module.modules():
        for function in (part.__dict__.get("pre_bwd_fn"), part.__dict__.get("post_bwd_fn")):
            if function is not None:
                sign(function.forward)


def sign(function: Any) -> None:
    """Keep a function's signature: torch asks for that of an autograd function at every call, and finds it anew."""
    function.__signature__ = inspect.signature(function)


def _gather(
    theirs: Callable[..., Any],
    coalesced: Callable[..., Any],
    params: Sequence[Any] | None = None,
    async_op: bool = False,
    hierarchy: int = 0,
) -> Any:
    """After each step: weights that are whole between steps are sent in one collective instead of one each."""
    if params is None or async_op:
        return theirs(params, async_op=async_op, hierarchy=hierarchy)
    away = [p for p in params if p.ds_status.name == "NOT_AVAILABLE"]
    if away:
        coalesced(away).wait()
    return None


def norm(gradients: Sequence[Tensor], params: Sequence[Any], norm_type: float = 2) -> Tensor:
    """The norm of gradients over all ranks in float64, -1 if it is not finite; theirs copies each to float64 first."""
    total = torch.stack(torch._foreach_norm(list(gradients), 2, torch.float64)).square().sum()
    if dist.world_size() > 1:
        torch.distributed.all_reduce(total)
    return torch.where(total.isfinite(), total.sqrt(), -1.0)
