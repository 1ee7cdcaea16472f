"""Guided sampling of latents with weights in bfloat16: our pipeline's loop around the network, and diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu import families
from bench.gpu.families import HALF, SHIFT, Family
from bench.gpu.graphs import Graphed
from ldm.models.layers import unchanging
from ldm.models.transformers.times import known_times
from ldm.pipeline.memory import compiled
from ldm.sampling import sample
from ldm.sampling.guidance import classifier_free
from ldm.sampling.registry import lookup
from ldm.sampling.times import times as spaced
from ldm.types import Cond

Draw = Callable[[int], Tensor]
"""Steps -> latents."""


def _memory_format(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def nothing(cond: Cond) -> Cond:
    """The conditioning of the empty prompt, of one row: its text and pooled text are zeros."""
    return {k: torch.zeros_like(v[:1]) if k in ("text", "pooled") else v[:1] for k, v in cond.items()}


def ours(family: Family, device: str, mode: str, layout: str) -> Draw:
    """As `ldm.pipeline` draws: texts known once, guidance in one call; modulations beforehand where not compiled."""
    network = families.ours(family, device, HALF).eval().requires_grad_(False)
    network.to(memory_format=_memory_format(layout))
    call: Any = network
    if mode in ("blocks", "whole"):
        call = compiled(network, torch.device(device), "blocks" if mode == "blocks" else None) or network
    elif mode == "graphs":
        call = Graphed(network)
    told = families.given(family, family.drawn, device)
    process, name = families.process(family), "ddim" if family.unet else "euler"
    denoise = process.denoiser(call)

    @torch.no_grad()
    def draw(steps: int) -> Tensor:
        known, empty = (network.prepared(c) for c in (told.cond, nothing(told.cond)))
        path = spaced(process.schedule, steps, "trailing" if family.unet else lookup(name).spacing)
        with unchanging(network, steps), known_times(network, list(path) if mode in ("eager", "blocks") else []):
            return sample(
                name, classifier_free(denoise, empty, family.guidance), told.x, known, schedule=process.schedule,
                steps=steps, times=path, eta=0.0 if family.unet else None, noise=lambda i: torch.zeros_like(told.x),
            )  # fmt: skip

    return draw


def theirs(family: Family, device: str, mode: str, layout: str) -> Draw:
    """The loop of their pipelines around the network."""
    network = families.theirs(family, device, HALF).eval().requires_grad_(False)
    network.to(memory_format=_memory_format(layout))
    if mode == "blocks":
        families.compile_blocks(network, fullgraph=True)
    elif mode == "whole":
        network.compile(mode="reduce-overhead" if device == "cuda" else "default", fullgraph=True)
    plain: Any = families.call_theirs(family, network)
    call = Graphed(plain) if mode == "graphs" else plain
    told = families.given(family, family.drawn, device, HALF)
    scheduler = _scheduler(family)
    both = {k: torch.cat([nothing(told.cond)[k].expand_as(v), v]) for k, v in told.cond.items()}
    guided = family.guidance != 1

    @torch.no_grad()
    def draw(steps: int) -> Tensor:
        scheduler.set_timesteps(steps, device=device)
        latents = told.x * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            x = torch.cat([latents] * 2) if guided else latents
            if mode == "whole":
                torch.compiler.cudagraph_mark_step_begin()
            out = call(x, t.expand(len(x)), both if guided else told.cond)
            if guided:
                uncond, cond = out.chunk(2)
                out = uncond + family.guidance * (cond - uncond)
            latents = scheduler.step(out, t, latents, return_dict=False)[0]
        return latents

    return draw


def _scheduler(family: Family) -> Any:
    import diffusers

    if not family.unet:
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing", prediction_type="v_prediction",
    )  # fmt: skip


def same(family: Family, device: str) -> float:
    """How far one answer of both networks, of the same weights in float32, is apart (relative)."""
    mine = families.ours(family, device).eval().requires_grad_(False)
    other = families.theirs(family, "meta").eval().requires_grad_(False)
    other.load_state_dict(mine.state_dict(), strict=True, assign=True)
    told = families.given(family, 1, device)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            a, b = mine(told.x, told.t, told.cond), families.call_theirs(family, other)(told.x, told.t, told.cond)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    apart = float((a - b).norm() / b.norm())
    if not apart < 1e-3:
        raise ValueError(f"the two networks do not compute the same ({apart:.1e} apart): their times tell nothing")
    return apart
