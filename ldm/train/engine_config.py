"""How training is divided over processes and computed: the config of the engine, and DeepSpeed's from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ldm.models.streaming import check_count
from ldm.precision import compute_dtype


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How training is divided and computed. `clip` 0 is no gradient clipping; precision `auto` is fp32 or
    bf16, whichever is faster here (`ldm.precision`); a run keeps what it began with.

    `offload_optimizer` keeps masters and optimizer state, and `offload_parameters` (stage 3) the weights, in the host's
    memory. `bucket`: elements that are sent at once; on CPUs the gradients of a network that one bucket holds are
    reduced after the backward pass, all at once (`ldm.train.flat`). `live`: up to so many weights stay whole between
    forward and backward at stage 3: with all of them a step sends 2 psi bytes, with 0 3 psi, for the least memory.
    `loss_scale` is fp16's: 0 finds it by itself, beginning at 2^`loss_scale_power`. `compile` is the backend of
    torch.compile for the trained network: "inductor" is fast and takes minutes at the start; "blocks" is inductor for
    its blocks, equal ones once, and starts in a fraction of the time. `tf32`: a GPU's float32 products and
    convolutions with 10-bit mantissas. `frozen`: what weights that do not train are stored in (`models.frozen`).
    `blocks_on_device`: so many blocks of a frozen network are on the device at once, the others in the host's memory
    (`models.streaming`).

    ZeRO++ (Wang et al. 2023, arXiv 2306.10209) divides stage 3 further (`ldm.train.zeropp`). hpZ: each `hpz_partition`
    neighbouring ranks, a node's, keep a copy of the weights from the forward pass on: only a step's first gather leaves
    the node. `quantized_weights`: weights are gathered in 8 bits, masters stay float32. `quantized_gradients`: those of
    matrices are reduced in 4 bits. Both need GPUs, and compile kernels at the start.

    On one process there is nothing to divide: every stage computes as stage 0 does, which copies least; but offloading
    and fp16 are as configured.
    """

    zero_stage: int = 1
    """The ZeRO stage, 0 to 3: what of optimizer state, gradients and weights is divided among ranks."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What is computed in; `auto` is fp32 or bf16, whichever is faster here."""
    clip: float = 1.0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 50_000_000
    live: int = 1_000_000_000
    loss_scale: float = 0.0
    loss_scale_power: int = 16
    compile: Literal["off", "blocks", "inductor", "aot_eager"] = "off"
    tf32: bool = True
    frozen: Literal["fp32", "bf16", "int8", "nf4"] = "fp32"
    blocks_on_device: int | None = None
    hpz_partition: int = 1
    quantized_weights: bool = False
    quantized_gradients: bool = False

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage: {self.zero_stage} is not one of [0, 1, 2, 3]")
        if self.clip < 0:
            raise ValueError(f"clip must be at least 0 (0 is off), got {self.clip}")
        if self.bucket < 1:
            raise ValueError(f"bucket must be at least 1 element, got {self.bucket}")
        if self.live < 0:
            raise ValueError(f"live must be at least 0 weights, got {self.live}")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer: needs zero_stage 1, 2 or 3, got 0")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters: needs zero_stage 3, got {self.zero_stage}")
        if self.hpz_partition < 1:
            raise ValueError(f"hpz_partition must be at least 1 rank (1 is off), got {self.hpz_partition}")
        for key, on in (
            ("hpz_partition", self.hpz_partition > 1),
            ("quantized_weights", self.quantized_weights),
            ("quantized_gradients", self.quantized_gradients),
        ):
            if on and self.zero_stage != 3:
                raise ValueError(f"{key}: needs zero_stage 3, got {self.zero_stage}")
        if self.compile == "blocks" and self.zero_stage == 3:
            raise ValueError("compile: 'blocks' needs zero_stage 0, 1 or 2, got 3, which gathers weights inside blocks")
        check_count(self.blocks_on_device)
        if self.blocks_on_device is not None and self.zero_stage == 3:
            raise ValueError(
                "blocks_on_device: needs zero_stage 0, 1 or 2, got 3, which moves weights itself; write null"
            )
        if self.blocks_on_device is not None and self.compile not in ("off", "blocks"):
            raise ValueError(
                f"blocks_on_device: needs compile 'off' or 'blocks', got {self.compile!r}, of the network whole"
            )
        if self.compile != "off" and self.frozen in ("int8", "nf4"):
            raise ValueError(
                f"compile: {self.compile!r} with frozen {self.frozen!r}: compiled code would keep weights whole from "
                "forward to backward; write compile: off, or frozen: bf16"
            )
        if self.loss_scale < 0:
            raise ValueError(f"loss_scale must be at least 0 (0: found by itself), got {self.loss_scale}")
        if not 0 <= self.loss_scale_power <= 32:
            raise ValueError(f"loss_scale_power must be in [0, 32], got {self.loss_scale_power}")
        if self.precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("precision: 'fp16' needs a GPU; on the CPU use fp32 or bf16")
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError("precision: 'fp16' needs zero_stage 1, 2 or 3, got 0")

    def dtype(self) -> torch.dtype:
        """What the forward computes in."""
        return compute_dtype(self.precision)

    def effective(self, world: int) -> EngineConfig:
        """What is run on so many processes: on one, stage 0 wherever a stage would only add copies.

        hpZ is off where one group holds them all, and whatever saves the wire is on one process.
        """
        changes: dict[str, Any] = {"hpz_partition": 1} if self.hpz_partition >= max(world, 2) else {}
        if world == 1:
            changes |= {key: False for key in ("quantized_weights", "quantized_gradients") if getattr(self, key)}
            if not (self.offload_optimizer or self.offload_parameters or self.precision == "fp16"):
                changes["zero_stage"] = 0
        return replace(self, **changes) if changes else self


def deepspeed_config(config: EngineConfig, micro_batch: int, accumulate: int) -> dict[str, Any]:
    """The whole DeepSpeed configuration, every key explicit."""
    pin = torch.cuda.is_available()
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_scatter": True,
        "reduce_bucket_size": config.bucket,
        "allgather_partitions": True,
        "allgather_bucket_size": config.bucket + config.bucket % 2,  # DeepSpeed asserts that it is even
        "use_multi_rank_bucket_allreduce": False,  # each gradient goes to its owner alone: 2 psi a step instead of 3
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
        "elastic_checkpoint": False,
        "load_from_fp32_weights": True,
        "sub_group_size": 1_000_000_000,
        "zero_hpz_partition_size": config.hpz_partition,
        "zero_quantized_weights": config.quantized_weights,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": config.quantized_gradients,
        "offload_optimizer": {"device": "cpu" if config.offload_optimizer else "none", "pin_memory": pin},
    }
    if config.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": config.bucket,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": config.live,
            "stage3_max_reuse_distance": config.live,
            "stage3_gather_16bit_weights_on_model_save": False,
            "offload_param": {"device": "cpu" if config.offload_parameters else "none", "pin_memory": pin},
        }
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": float(config.clip) if config.zero_stage else 0.0,  # at stage 0 the engine clips itself
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "disable_allgather": False,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "fp16": _fp16(config),
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "flops_profiler": {"enabled": False},
        "comms_logger": {"enabled": False},
    }


def _fp16(config: EngineConfig) -> dict[str, Any]:
    return {
        "enabled": config.precision == "fp16",
        "auto_cast": False,
        "loss_scale": float(config.loss_scale),
        "initial_scale_power": config.loss_scale_power,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1,
    }
