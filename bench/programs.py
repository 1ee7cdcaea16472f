"""The U-Nets as they come: our programs beside scripts around diffusers, a process each, in turns.

Ours keeps freed memory and trains with the plain attention kernel, as our trainer does on CPUs; sampling is what
our pipeline does around the network: keys and values of the text once, equal rows of guidance once, and in half
precision channels_last. Theirs is what their text-to-image pipeline and their training scripts do. In bfloat16 both
hold the network in it for sampling, and train under autocast.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.apart import Worker, compare, serve
from bench.networks import QUICK, SHAPES, Shape, adam, both, call_of, deviation, inputs, plain, quiet, training, under
from bench.timing import Options
from ldm.allocator import keep_freed_memory
from ldm.diffusion.prediction import Epsilon
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Discrete
from ldm.models.layers import unchanging
from ldm.models.unet import UNet
from ldm.sampling import sample
from ldm.sampling.guidance import classifier_free

GUIDANCE = 3.0
HALF = torch.bfloat16


def our_sampling(ours: UNet, x: Tensor, text: Tensor, steps: int, half: bool = False) -> Callable[[], Tensor]:
    """Guided DDIM, trailing times, as our pipeline runs it."""
    process = Process(schedule=Discrete(), prediction=Epsilon())

    @functools.cache  # SD's weights several times over only where they are asked for
    def network() -> UNet:
        return copy.deepcopy(ours).to(HALF, memory_format=torch.channels_last) if half else ours

    @torch.no_grad()
    def draw() -> Tensor:
        given = text.to(HALF) if half else text
        known, empty = ({"kv": network().keys_values(v)} for v in (given, torch.zeros_like(given[:1])))
        denoise = classifier_free(process.denoiser(network()), empty, GUIDANCE)
        with unchanging(network(), steps):
            return sample(
                "ddim", denoise, x, known, schedule=process.schedule, steps=steps, eta=0.0, spacing="trailing",
                noise=lambda i: torch.zeros_like(x),
            )  # fmt: skip

    return draw


def their_sampling(theirs: nn.Module, x: Tensor, text: Tensor, steps: int, half: bool = False) -> Callable[[], Tensor]:
    """The loop of their text-to-image pipeline around the network."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing",
    )  # fmt: skip
    states = torch.cat([torch.zeros_like(text), text])
    if half:
        states, x = states.to(HALF), x.to(HALF)

    @functools.cache
    def network() -> nn.Module:
        return copy.deepcopy(theirs).to(HALF) if half else theirs

    @torch.no_grad()
    def draw() -> Tensor:
        scheduler.set_timesteps(steps)
        latents = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            uncond, cond = network()(given, t, encoder_hidden_states=states, return_dict=False)[0].chunk(2)
            latents = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, latents, return_dict=False)[0]
        return latents

    return draw


def alone(name: str, which: str, quick: bool) -> dict[str, Callable[[], object]]:
    """What a process that only has one of the networks is asked for."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    shape = (QUICK if quick else SHAPES)[name]
    ours, theirs = both(shape.config)
    x, t, text = inputs(shape)
    drawn = x[: shape.drawn], text[: shape.drawn]
    steps = 4 if quick else 20
    network = ours if which == "ldm" else theirs
    call, optimizer = call_of(network), adam(network)
    cases: dict[str, Callable[[], object]] = {"forward": quiet(call, x, t, text)}
    for half, of in ((False, ""), (True, " bf16")):
        if which == "ldm":
            keep_freed_memory()
            cases[f"sampling{of}"] = our_sampling(ours, *drawn, steps, half)
            cases[f"training{of}"] = under(plain, training(optimizer, call, x, t, text, half=half))
        else:
            cases[f"sampling{of}"] = their_sampling(theirs, *drawn, steps, half)
            cases[f"training{of}"] = training(optimizer, call, x, t, text, half=half)
    return cases


def same_pictures(shape: Shape, steps: int) -> float:
    """How far both drawn latents are apart, relative. Raises ValueError where it is not rounding."""
    ours, theirs = both(shape.config)
    x, _, text = (v[: shape.drawn] for v in inputs(shape))
    apart = deviation(our_sampling(ours, x, text, steps)(), their_sampling(theirs, x, text, steps)())
    if not apart < 1e-3:
        raise ValueError(f"the two samplers do not draw the same ({apart:.1e}): nothing to compare")
    return apart


def as_they_come(name: str, shape: Shape, options: Options) -> dict[str, Any]:
    """Both as programs: sampling first, as a process that has trained holds more memory."""
    argv = ["-m", "bench.programs", name]
    quick = str(int(options.quick))
    cases = ["forward", "sampling", "sampling bf16", *(("training", "training bf16") if shape.twice else ())]
    rounds = options.times(shape.rounds)
    result: dict[str, Any] = {"drawn_apart": same_pictures(shape, 4)}
    with Worker([*argv, "ldm", quick]) as ours, Worker([*argv, "diffusers", quick]) as theirs:
        return result | {case: compare(name, ours, theirs, case, rounds) for case in cases}


if __name__ == "__main__":
    serve(alone(sys.argv[1], sys.argv[2], sys.argv[3] == "1"))
