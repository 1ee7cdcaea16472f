"""Training steps in bfloat16 under autocast: ours as the engine runs them on one card, and diffusers' scripts' loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu import families
from bench.gpu.families import HALF, Family
from ldm.adapters.lora import LoraAdapter, LoraConfig
from ldm.models import compiling
from ldm.models.presets import AUTOENCODERS
from ldm.models.vae.autoencoder import Autoencoder
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.objectives.inputs import SIZES
from ldm.rng import Rng
from ldm.train.optim import Optim
from ldm.types import Batch, Cond

CLIP, RANK = 1.0, 16
OPTIM = Optim(lr=1e-5)
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
"""What diffusers' scripts correct by LoRA, in the U-Net and in the transformers; ours corrects the same layers."""
Step = Callable[[], object]


def trained_of(network: Any, lora: bool) -> nn.Module:
    """What trains: the network, or the corrections around it, which then is in bfloat16."""
    if not lora:
        return network.train()
    network.to(HALF)
    return LoraAdapter(LoraConfig(rank=RANK, targets=tuple(TARGETS))).attach(network, [])


def objective_of(family: Family, network: Any, trained: nn.Module, device: str) -> DenoiseObjective:
    """Our loss."""
    codec = LatentCodec(Autoencoder(AUTOENCODERS["tiny"]), 0.18)  # for its factor alone: latents are given

    def text(prompts: Any) -> Cond:
        told = families.given(family, len(prompts), device).cond
        return {k: v for k, v in told.items() if k in ("text", "pooled")}

    options = DenoiseOptions(guidance=families.TOLD if family.flux else None)
    below = None if trained is network else network
    return DenoiseObjective(trained, families.process(family), codec, text, options, below=below)


def batch_of(family: Family, rows: int, device: str) -> Batch:
    """A batch as a cache gives it, on the device."""
    told = families.given(family, rows, device)
    batch: Batch = {
        "moments": torch.cat([told.x, torch.full_like(told.x, -3.0)], dim=1),
        "weight": torch.ones(rows, device=device),
        "key": [str(i) for i in range(rows)],
        **{k: v for k, v in told.cond.items() if k in ("text", "pooled")},
    }
    if "time_ids" in told.cond:
        batch |= {name: told.cond["time_ids"][:, 2 * i : 2 * i + 2] for i, name in enumerate(SIZES)}
    return batch


def ours(family: Family, rows: int, device: str, mode: str, *, lora: bool, layout: str = "contiguous") -> Step:
    """The engine's step at stage 0: autocast, the gradients' norm and clip, one fused AdamW."""
    network = families.ours(family, device)
    if layout == "channels_last":
        network.to(memory_format=torch.channels_last)
    trained = trained_of(network, lora)
    objective = objective_of(family, network, trained, device)
    optimizer = OPTIM.build(objective.parameters())
    if mode == "blocks":
        compiling.by_block(network)
    elif mode == "whole":
        objective.trained.compile(backend="inductor")
    batch, weights, done = batch_of(family, rows, device), list(objective.parameters()), 0

    def step() -> None:
        nonlocal done
        positions = range(done, done + rows)
        done += rows
        with torch.autocast(device, dtype=HALF):
            loss, _ = objective({**batch, "position": torch.tensor(positions)}, Rng.of(0, positions))
        loss.backward()
        _update(weights, optimizer)

    return step


def _update(weights: list[Any], optimizer: torch.optim.Optimizer) -> None:
    given = [p for p in weights if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in given])
    if not torch.isfinite(norm):  # waits for the device, as the engine does
        raise ValueError("the gradients are not finite")
    torch.nn.utils.clip_grads_with_norm_(given, CLIP, norm)
    optimizer.step()
    optimizer.zero_grad()


def engine(family: Family, rows: int, device: str, mode: str) -> Step:
    """Ours through DeepSpeed."""
    from ldm.train.engine import Engine
    from ldm.train.engine_config import EngineConfig

    network = families.ours(family, device)
    objective = objective_of(family, network, network.train(), device)
    config = EngineConfig(precision="bf16", clip=CLIP, compile="blocks" if mode == "blocks" else "off")
    made = Engine(objective, OPTIM.build(objective.parameters()), config, micro_batch=rows, accumulate=1)
    batch, done = batch_of(family, rows, device), 0

    def step() -> None:
        nonlocal done
        positions = range(done, done + rows)
        done += rows
        loss, _ = made.forward({**batch, "position": torch.tensor(positions)}, Rng.of(0, positions))
        made.backward_step(loss)

    return step


def theirs(family: Family, rows: int, device: str, mode: str, *, lora: bool, layout: str = "contiguous") -> Step:
    """The lines of diffusers' training scripts around their network: frozen weights in bfloat16 under LoRA."""
    network = families.theirs(family, device)
    if layout == "channels_last":
        network.to(memory_format=torch.channels_last)
    if lora:
        from peft import LoraConfig as PeftConfig

        network.requires_grad_(False).to(HALF)
        config = PeftConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS)
        network.add_adapter(config)
        for p in network.parameters():
            if p.requires_grad:
                p.data = p.data.float()
    network.train()
    if mode == "blocks":
        families.compile_blocks(network)
    elif mode == "whole":
        network.compile()
    call = families.call_theirs(family, network)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIM.lr, betas=OPTIM.betas, weight_decay=OPTIM.weight_decay, fused=True)
    told, noised = families.given(family, rows, device), _noising(family, device)

    def step() -> None:
        noise = torch.randn_like(told.x)
        x, t, target = noised(told.x, noise)
        with torch.autocast(device, dtype=HALF):
            out = call(x, t, told.cond)
        torch.nn.functional.mse_loss(out.float(), target.float()).backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _noising(family: Family, device: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """(x_0, noise) -> (noised, times, target): their scheduler's v-prediction, or the line of their flow scripts."""
    if family.unet:
        from diffusers import DDPMScheduler

        scheduler: Any = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
        )

        def noised(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            t = torch.randint(0, 1000, (len(x),), device=device)
            return scheduler.add_noise(x, noise, t), t, scheduler.get_velocity(x, noise, t)

        return noised

    def mixed(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigma = torch.sigmoid(torch.randn(len(x), device=device))
        at = sigma.view(-1, 1, 1, 1)
        return (1 - at) * x + at * noise, 1000 * sigma, noise - x

    return mixed
