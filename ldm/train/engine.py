"""The one door to DeepSpeed: ZeRO stages, precision, accumulation, clipping, and the float32 master shards.

Weights and optimizer state are float32; `precision` is what the forward computes in (autocast). Every DeepSpeed key
that matters is written here and nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm import allocator, dist
from ldm.models import compiling
from ldm.models.network import Around, Network
from ldm.objectives.base import Objective
from ldm.rng import Rng
from ldm.train import flat, packages, stage3, zeropp
from ldm.train.engine_config import EngineConfig, deepspeed_config
from ldm.train.fragments import Fragment
from ldm.train.muon import Muon
from ldm.types import Batch, Metrics


def start() -> None:
    """Join the process group (also for one process). Raises what `dist.join` does; a second call does nothing."""
    deepspeed = _deepspeed()
    # DeepSpeed calls collectives by their older names; its users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if dist.initialized():
        return
    dist.check()
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in defaults.items():  # of an empty variable nothing is known either
        os.environ[name] = os.environ.get(name, "").strip() or value
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.local_rank())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.join()
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _deepspeed() -> Any:
    """Import DeepSpeed, quiet, and without the C++ compilation that it starts on CPUs."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.comm
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed


def compile_blocks(trained: nn.Module, backend: compiling.Backend = "inductor") -> int:
    """Compile the blocks of the network that is trained, or that an adapter corrects; how many kinds of them there are.

    Raises ValueError for what trains without a denoising network.
    """
    network = trained.network if isinstance(trained, Around) else trained
    if not isinstance(network, Network):
        what = type(trained).__name__
        raise ValueError(f"compile: 'blocks' is for denoising networks, and {what} trains; use 'inductor' or 'off'")
    return compiling.by_block(network, backend)


def check_streamed(trained: nn.Module) -> None:
    """Raise ValueError unless what trains is around a network whose blocks come and go."""
    if not isinstance(trained, Around) or trained.network.streaming is None:
        raise ValueError(
            "train.engine.blocks_on_device: is for networks that stay frozen (LoRA, DoRA, textual inversion); here "
            f"{type(trained).__name__} trains, whose weights must stay where the optimizer has them; write null"
        )


def _attention(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """On the CPU the plain attention kernel: the backward of the fused one is several times slower (docs/log.md)."""
    if device.type != "cpu":
        return contextlib.nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def _norm(gradients: list[Tensor], params: list[Any], norm_type: float = 2) -> Tensor:
    """The norm of float32 gradients over all ranks, -1 if it is not finite, for DeepSpeed's stages 1 and 2.

    Theirs first copies every gradient to float64, which takes longer than Adam's update on a CPU.
    """
    own = [g for g in gradients if not getattr(g, "_zero_padding", False)]  # their mark, which others lack
    total = flat.squares(own)
    if dist.world_size() > 1:
        torch.distributed.all_reduce(total)
    return torch.where(total.isfinite(), total.sqrt(), -1.0)


class Engine:
    """A DeepSpeed engine around an objective."""

    def __init__(
        self,
        module: Objective,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        *,
        micro_batch: int,
        accumulate: int,
    ) -> None:
        if config.blocks_on_device is not None:
            check_streamed(module.trained)
        deepspeed = _deepspeed()
        start()
        zeropp.check(config)
        zeropp.tell(config)
        config = config.effective(dist.world_size())
        self.config, self.accumulate = config, accumulate
        self.dtype = config.dtype()
        self.device = dist.device()
        allocator.keep_freed_memory(self.device.type)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
        zeropp.prepare(deepspeed, module, config)
        settings = deepspeed_config(config, micro_batch, accumulate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._engine: Any = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]
        if config.zero_stage == 0 and dist.world_size() == 1:
            self._engine.enable_backward_allreduce = False  # three copies of the gradients for nothing
        self._flat = self._reduced_flat()
        if config.zero_stage in (1, 2) and config.precision != "fp16":  # whose gradients are in half precision
            self._engine.optimizer.get_grad_norm_direct = _norm
        if config.zero_stage == 3 and self.device.type == "cpu" and dist.world_size() > 1:
            stage3.lighten(self._engine.optimizer, module, config)
        self._fragments = self._find_fragments()
        if isinstance(optimizer, Muon) and config.zero_stage:
            shapes, trained = self.shapes(), self._trained()
            optimizer.divide(self.masters, self._fragments, {n: shapes[n] for n, p in trained if optimizer.has(p)})
        if config.quantized_weights:
            zeropp.gather_small_exactly(deepspeed, module)
        if config.compile == "blocks":
            compile_blocks(self.module.trained)
        elif config.compile != "off":
            self.module.trained.compile(backend=config.compile)
        self._norm = 0.0  # of stage 0, where DeepSpeed neither tells the norm nor keeps NaN out of the weights

    def _reduced_flat(self) -> flat.Whole | flat.Divided | None:
        """What reduces gradients in DeepSpeed's place, on CPUs if one bucket holds them all."""
        trained = [p for _, p in self._trained()]
        if self.device.type != "cpu" or not flat.fits(self.config, sum(p.numel() for p in trained)):
            return None
        return (
            flat.Divided(self._engine, self.config.zero_stage)
            if self.config.zero_stage
            else flat.Whole(self._engine, trained)
        )

    # --- the step ---------------------------------------------------------------------------------------------------
    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Loss and metrics of a micro-batch in the compute dtype."""
        with self.autocast(), _attention(self.device):
            return self._engine(batch, rng)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Compute in the configured dtype inside."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def backward_step(self, loss: Tensor) -> bool:
        """Backward; at an accumulation boundary also the optimizer step. Whether weights were updated.

        Gradients that are not finite update nothing and are dropped, on all ranks alike.
        """
        with _attention(self.device):  # gradient checkpointing runs forward code again
            self._engine.backward(loss)
        boundary = self._engine.is_gradient_accumulation_boundary()
        if self._flat is not None:
            self._flat.reduce(boundary)
        finite = not boundary or self.config.zero_stage > 0 or self._clip_here()
        self._engine.step()
        return bool(boundary and finite and self._engine.was_step_applied())

    def _clip_here(self) -> bool:
        """Clip the reduced gradients of stage 0; if they are not finite, drop them. Whether they are."""
        trained = [p for _, p in self._trained() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        self._norm = float(norm)
        if not math.isfinite(self._norm):
            for p in trained:
                p.grad = None  # which torch's optimizers leave alone
            return False
        if self.config.clip:
            torch.nn.utils.clip_grads_with_norm_(trained, self.config.clip, norm)
        return True

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all groups, of each its share."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1.0)

    @property
    def grad_norm(self) -> float:
        """Gradient norm of the last step before clipping; inf or NaN when that step updated nothing."""
        if self.config.zero_stage == 0:
            return self._norm
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    @property
    def module(self) -> Objective:
        """The objective."""
        return self._engine.module

    def scale(self) -> dict[str, float]:
        """The loss scale of fp16; nothing at other precisions."""
        return {"loss_scale": float(self._engine.optimizer.loss_scaler.cur_scale)} if self._scaled else {}

    def load_scale(self, scale: dict[str, float]) -> None:
        """Undo `scale`."""
        if self._scaled and "loss_scale" in scale:
            self._engine.optimizer.loss_scaler.cur_scale = scale["loss_scale"]

    @property
    def _scaled(self) -> bool:
        return self.config.precision == "fp16"

    # --- the float32 master shards ------------------------------------------------------------------------------------
    @property
    def masters(self) -> list[Tensor]:
        """The local float32 master tensors: flat shards under ZeRO, whole parameters at stage 0."""
        optimizer, stage = self._engine.optimizer, self.config.zero_stage
        if stage in (1, 2):
            return list(optimizer.single_partition_of_fp32_groups)
        if stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return [p for group in optimizer.param_groups for p in group["params"]]

    def weights_to_use(self) -> list[Tensor]:
        """The masters, or what schedule-free training averages them to (a copy), laid out like them."""
        return packages.averaged(self.inner, self.masters) if packages.is_schedule_free(self.inner) else self.masters

    @property
    def fragments(self) -> list[Fragment]:
        """Pieces of trained parameters whose masters live on this rank."""
        return self._fragments

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The torch optimizer."""
        optimizer = self._engine.optimizer
        return optimizer if self.config.zero_stage == 0 else optimizer.optimizer

    def shapes(self) -> dict[str, list[int]]:
        """Whole shapes of the trained parameters."""
        divided = self.config.zero_stage == 3  # where a parameter is empty between steps
        return {n: list(p.ds_shape if divided else p.shape) for n, p in self._trained()}

    def _trained(self) -> list[tuple[str, Any]]:
        return [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]

    def _find_fragments(self) -> list[Fragment]:
        optimizer, stage = self._engine.optimizer, self.config.zero_stage
        if stage == 0:
            index = {id(p): i for i, p in enumerate(self.masters)}
            return [Fragment(n, tuple(p.shape), 0, p.numel(), index[id(p)], 0) for n, p in self._trained()]
        found = []
        for name, p in self._trained():
            if stage == 3:
                group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
                first = min(size * dist.rank(), p.ds_numel)
                length = max(0, min(size, p.ds_numel - first))
                if length:
                    found.append(Fragment(name, tuple(p.ds_shape), first, length, group, offset))
            elif p._hp_mapping is not None:
                low, high = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                group = p._hp_mapping.param_group_index
                found.append(Fragment(name, tuple(p.shape), low.start, low.numel, group, high.start))
        return found

    def full(self, shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Whole float32 tensors on the CPU from shards laid out like `masters`; collective, one at a time."""
        mine = {f.name: f for f in self._fragments}
        for name, p in self._trained():
            shape = tuple(p.ds_shape if self.config.zero_stage == 3 else p.shape)
            f = mine.get(name)
            if self.config.zero_stage == 0:
                assert f is not None
                yield name, shards[f.flat].detach().float().cpu().view(shape).clone()
                continue
            numel = p.ds_numel if self.config.zero_stage == 3 else p.numel()
            whole = torch.zeros(numel, dtype=torch.float32, device=shards[0].device)
            if f is not None:
                whole[f.start : f.start + f.length] = shards[f.flat].detach()[f.offset : f.offset + f.length]
            if dist.world_size() > 1:
                torch.distributed.all_reduce(whole)
            yield name, whole.view(shape).cpu()

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Whole trained weights by name, float32; collective, and a copy only where weights are divided or rounded."""
        if self.config.zero_stage == 3 or self.config.precision == "fp16":
            yield from self.full(self.masters)
        else:
            yield from ((name, p.detach()) for name, p in self._trained())

    @torch.no_grad()
    def push(self) -> None:
        """Copy the masters into the weights that the forward uses, after writing into the masters."""
        optimizer, stage = self._engine.optimizer, self.config.zero_stage
        if stage in (1, 2):
            optimizer.update_lp_params()
        elif stage == 3:
            optimizer.checkpoint_event_prologue()
            for i in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(i)
            optimizer.checkpoint_event_epilogue()
            optimizer.invalidate_secondary_tensor()  # hpZ's copies, which the prologue took of the weights as they were

    @contextlib.contextmanager
    def applied(self, shards: list[Tensor]) -> Iterator[None]:
        """Inside, the network runs with these shards (EMA, say) instead of the masters."""
        self._swap(shards)
        try:
            yield
        finally:
            self._swap(shards)

    @torch.no_grad()
    def _swap(self, shards: list[Tensor]) -> None:
        for shard, master in zip(shards, self.masters, strict=True):
            kept = master.detach().clone()
            master.data.copy_(shard)
            shard.copy_(kept)
        self.push()
