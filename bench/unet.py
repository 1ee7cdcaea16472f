"""Our U-Net against diffusers' UNet2DConditionModel: same shape, same weights, same optimizer, float32.

Training is forward, backward and AdamW, with PyTorch's own choice of attention kernel and with the plain one, which our
engine takes on CPUs. Sampling is 20 guided DDIM steps: our sampler on our network, their scheduler in their loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import parts
from bench.timing import Options, interleaved, report
from ldm.config.load import encode
from ldm.diffusion.prediction import Epsilon
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Discrete
from ldm.models.unet import UNet, UNetConfig
from ldm.sampling import sample
from ldm.sampling.guidance import classifier_free

GUIDANCE = 3.0
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, t, text states) -> output."""


def both(config: UNetConfig) -> tuple[UNet, nn.Module]:
    """Our network and theirs with our weights."""
    from diffusers import UNet2DConditionModel

    ours = parts.unet(config)
    nn.init.normal_(ours.conv_out.weight, std=0.02)  # starts at zero, and zeros would agree whatever came before
    theirs: Any = UNet2DConditionModel.from_config({k: v for k, v in encode(config).items() if v is not None})
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def training(network: nn.Module, call: Network, x: Tensor, t: Tensor, text: Tensor) -> Callable[[], object]:
    """A step of the mean squared error to a fixed target."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    def step() -> None:
        (call(x, t, text) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """PyTorch's attention by its formula."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def under(
    context: Callable[[], contextlib.AbstractContextManager[Any]], step: Callable[[], object]
) -> Callable[[], object]:
    """The step inside a context."""

    def inside() -> None:
        with context():
            step()

    return inside


def our_sampling(ours: UNet, x: Tensor, text: Tensor, steps: int) -> Callable[[], Tensor]:
    """Guided DDIM, trailing times."""
    process = Process(schedule=Discrete(), prediction=Epsilon())

    @torch.no_grad()
    def draw() -> Tensor:
        denoise = classifier_free(process.denoiser(ours), {"text": torch.zeros_like(text[:1])}, GUIDANCE)
        return sample(
            "ddim", denoise, x, {"text": text}, schedule=process.schedule, steps=steps,
            noise=lambda i: torch.zeros_like(x), eta=0.0, spacing="trailing",
        )  # fmt: skip

    return draw


def their_sampling(theirs: nn.Module, x: Tensor, text: Tensor, steps: int) -> Callable[[], Tensor]:
    """The loop of their text-to-image pipeline around the network."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing",
    )  # fmt: skip
    states = torch.cat([torch.zeros_like(text), text])

    @torch.no_grad()
    def draw() -> Tensor:
        scheduler.set_timesteps(steps)
        latents = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            uncond, cond = theirs(given, t, encoder_hidden_states=states, return_dict=False)[0].chunk(2)
            latents = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, latents, return_dict=False)[0]
        return latents

    return draw


def deviation(a: Tensor, b: Tensor) -> float:
    """Relative to the second."""
    return float((a - b).norm() / b.norm())


def run(options: Options) -> dict[str, Any]:
    """Measure on the CPU."""
    config = parts.unet_config(options.quick)
    size, drawn, steps = (2, 1, 4) if options.quick else (32, 8, 20)
    ours, theirs = both(config)
    g, side = torch.Generator().manual_seed(4), config.sample_size or 16
    x = torch.randn(size, config.in_channels, side, side, generator=g)
    text = torch.randn(size, parts.TOKENS, parts.text_states(config), generator=g)
    t = torch.randint(0, 1000, (size,), generator=g)

    def call_theirs(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return theirs(x, t, encoder_hidden_states=text, return_dict=False)[0]

    def call_ours(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return ours(x, t, {"text": text})

    draws = {
        "ldm sampling": our_sampling(ours, x[:drawn], text[:drawn], steps),
        "diffusers sampling": their_sampling(theirs, x[:drawn], text[:drawn], steps),
    }
    with torch.no_grad():
        apart = deviation(call_ours(x, t, text), call_theirs(x, t, text))
    drawn_apart = deviation(*(draw() for draw in draws.values()))
    print(f"outputs differ by {apart:.1e}, drawn latents by {drawn_apart:.1e} (relative)")
    if not (apart < 1e-3 and drawn_apart < 1e-3):
        raise ValueError("the two networks do not compute the same: nothing to compare")
    seconds = interleaved(draws, options.times(8), warmup=1)
    result = {"sampling": report(f"{steps} guided steps, {drawn} pictures", seconds, [tuple(draws)])}  # type: ignore[list-item]
    steps_of = {
        "ldm": training(ours, call_ours, x, t, text),
        "diffusers": training(theirs, call_theirs, x, t, text),
    }
    cases = steps_of | {f"{name}, plain attention": under(plain, step) for name, step in steps_of.items()}
    seconds = interleaved(cases, options.times(12), warmup=1 if options.quick else 2)
    pairs = [
        ("ldm", "diffusers"),
        ("ldm, plain attention", "diffusers, plain attention"),
        ("ldm, plain attention", "ldm"),
    ]
    result["training"] = report(f"forward, backward, AdamW, batch {size}, float32", seconds, pairs)
    return result | {
        "batch": size,
        "pictures": drawn,
        "steps": steps,
        "outputs_apart": apart,
        "drawn_apart": drawn_apart,
    }
