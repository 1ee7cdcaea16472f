"""A mixture of Gaussians in the plane: exact scores, a network trained in seconds, samplers, guidance, likelihood.

    python examples/mixture_2d.py --out mixture_2d

Eight Gaussians on a ring, alternately of class 0 and 1. Everything a diffusion model is trained for is known exactly
here, so each figure has the truth beside it. Writes samplers.png and guidance.png and prints three tables.
Takes about half a minute on one CPU core.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from launch.options import Parser
from ldm.diffusion import Discrete, Process, V, bound
from ldm.sampling import sample
from ldm.sampling.guidance import classifier_free
from ldm.types import Cond, Denoise

SCHEDULE = Discrete(betas="linear", beta_start=1e-4, beta_end=0.02)
PROCESS = Process(schedule=SCHEDULE, prediction=V())
ANGLES = torch.arange(8) * math.pi / 4
CENTRES = 1.2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)  # (8, 2)
CLASSES = torch.arange(8) % 2
STD = 0.12
NOTHING = 2  # the class that stands for none


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points (B, 2, 1, 1), shaped as pictures of one pixel, and their classes (B,)."""
    g = torch.Generator().manual_seed(seed)
    which = torch.randint(8, (count,), generator=g)
    points = CENTRES[which] + STD * torch.randn(count, 2, generator=g)
    return points[:, :, None, None], CLASSES[which]


def members(label: Tensor) -> Tensor:
    """log weight (B, 8) of each Gaussian under a class, even among its members."""
    allowed = (label[:, None] == NOTHING) | (CLASSES[None] == label[:, None])
    return torch.where(allowed, 0.0, -torch.inf).log_softmax(1)


def exact(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """E[x_0 | x_t]: per Gaussian the linear estimate, averaged by how probable each is given x_t."""
    alpha, sigma = (v[:, None, None] for v in SCHEDULE.alpha_sigma(t))
    variance = alpha**2 * STD**2 + sigma**2
    gap = x[:, None, :, 0, 0] - alpha * CENTRES  # (B, 8, 2)
    chance = (members(cond["class"]) - (gap**2).sum(2) / (2 * variance[:, :, 0])).softmax(1)
    each = CENTRES + alpha * STD**2 * gap / variance
    return (chance[:, :, None] * each).sum(1)[:, :, None, None]


def true_nll(x: Tensor) -> Tensor:
    """-log density (B,) of the mixture, in nats."""
    gap = ((x[:, None, :, 0, 0] - CENTRES) ** 2).sum(2)
    return -(torch.logsumexp(-gap / (2 * STD**2), 1) - math.log(8) - math.log(2 * math.pi * STD**2))


class Network(nn.Module):
    """A small perceptron of waves of the point, waves of the time, and the class."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.label = nn.Embedding(3, width)
        self.time = nn.Linear(32, width)
        self.point = nn.Linear(18, width)
        self.body = nn.Sequential(*[layer for _ in range(3) for layer in (nn.SiLU(), nn.Linear(width, width))])
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(width, 2))
        self.register_buffer("rates", torch.exp(torch.linspace(0, 5, 16)), persistent=False)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.out(self.hidden(x, t, cond))[:, :, None, None]

    def hidden(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the answer is read from, (B, width)."""
        phase = t[:, None].float() / SCHEDULE.steps * self.rates
        point = x[:, :, 0, 0]
        waves = torch.cat([point * 2.0**k for k in range(4)], 1)
        h = (
            self.point(torch.cat([point, waves.sin(), waves.cos()], 1))
            + self.time(torch.cat([phase.sin(), phase.cos()], 1))
            + self.label(cond["class"])
        )
        return h + self.body(h)


def train(steps: int, batch: int = 256) -> Network:
    """DDPM's training (alg. 1), the class left out three times in ten for guidance."""
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x0, label = data(batch, seed=1000 + step)
        label = torch.where(torch.rand(batch) < 0.3, NOTHING, label)
        t, noise = PROCESS.times(torch.rand(batch)), torch.randn_like(x0)
        out = network(PROCESS.add_noise(x0, noise, t), t, {"class": label})
        loss = PROCESS.loss(out, x0, noise, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return network.eval()


def noise_of(count: int):
    """The noise of each sampling step, the same for every sampler."""
    return lambda i: torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(50_000 + i))


def draw(name: str, denoise: Denoise, steps: int, count: int, label: int = NOTHING) -> Tensor:
    """`count` samples of a sampler."""
    start = noise_of(count)(-1)
    cond = {"class": torch.full((count,), label)}
    return sample(name, denoise, start, cond, schedule=SCHEDULE, steps=steps, noise=noise_of(count), spacing="karras")


def distance(x: Tensor, seed: int = 7) -> float:
    """Energy distance between samples and as many points of the data; 0 for equal distributions."""
    a, b = x[:1000, :, 0, 0], data(1000, seed)[0][:, :, 0, 0]
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def picture(x: Tensor, title: str, side: int = 150) -> Image.Image:
    """The samples' density, with a title."""
    points = x[:, :, 0, 0].clamp(-1.99, 1.99)
    counts, *_ = np.histogram2d(-points[:, 1].numpy(), points[:, 0].numpy(), bins=side, range=[[-2, 2], [-2, 2]])
    grey = 255 - np.clip(counts * 90, 0, 255)
    image = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    ImageDraw.Draw(image).text((4, 2), title, fill="black")
    return image


def grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures as one."""
    width, height = rows[0][0].size
    whole = Image.new("RGB", (width * len(rows[0]), height * len(rows)), "white")
    for j, row in enumerate(rows):
        for i, image in enumerate(row):
            whole.paste(image, (i * width, j * height))
    return whole


def show_samplers(denoisers: dict[str, Denoise], count: int) -> Image.Image:
    """Samplers at few and many steps, and how far their samples are from the data."""
    print("\nenergy distance to the data" + "".join(f"{name:>12}" for name in denoisers))
    print(f"{'(other data: ' + format(distance(data(1000, 8)[0]), '.4f') + ')':27}")
    rows: list[list[Image.Image]] = [[] for _ in denoisers]
    for name, steps in (("ddpm", 10), ("ddpm", 100), ("ddim", 10), ("ddim", 50), ("heun", 10), ("dpmpp_2m", 10)):
        line = f"{name:>12} {steps:4} steps     "
        for row, (source, denoise) in zip(rows, denoisers.items()):
            x = draw(name, denoise, steps, count)
            row.append(picture(x, f"{source}: {name} {steps}"))
            line += f"{distance(x):12.4f}"
        print(line)
    return grid(rows)


def show_guidance(denoisers: dict[str, Denoise], count: int) -> Image.Image:
    """Class 1 at growing guidance: more of the class, in the end less of its spread."""
    print("\nguidance to class 1: share of it (spread)" + "".join(f"{name:>16}" for name in denoisers))
    rows: list[list[Image.Image]] = [[] for _ in denoisers]
    for scale in (0.0, 0.5, 1.0, 2.0, 4.0):
        line = f"{scale:>24.1f}                 "
        for row, (source, denoise) in zip(rows, denoisers.items()):
            guided = classifier_free(denoise, {"class": torch.tensor([NOTHING])}, scale)
            x = draw("heun", guided, 30, count, label=1)
            gap, which = torch.cdist(x[:, :, 0, 0], CENTRES).min(1)
            row.append(picture(x, f"{source}: scale {scale:g}"))
            line += f"{float((CLASSES[which] == 1).float().mean()):9.3f} ({float(gap.mean()):.3f})"
        print(line)
    return grid(rows)


def show_likelihood(denoisers: dict[str, Denoise], count: int = 1000) -> dict[str, dict[int, float]]:
    """The variational bound of held-out points over more and more times; it closes in on the truth from above."""
    x0, _ = data(count, seed=9)
    cond = {"class": torch.full((count,), NOTHING)}
    print(f"\nbound on -log p, nats a point; the truth is {float(true_nll(x0).mean()):.4f}")
    found: dict[str, dict[int, float]] = {}
    for source, denoise in denoisers.items():
        found[source] = {}
        for steps in (10, 50, 250):
            # Evenly spaced in the square root: the terms of small noise are the large ones.
            times = sorted({round((SCHEDULE.steps - 1) * (i / (steps - 1)) ** 2) for i in range(steps)})
            values = [
                float(
                    bound(
                        PROCESS, denoise, x0, cond, noise=noise_of(count), times=times, variance=v, bins=None
                    ).total.mean()
                )
                for v in ("small", "large")
            ]
            found[source][steps] = min(values)
            print(f"{source:>12} {len(times):4} times: {values[0]:8.4f} with variance small, {values[1]:8.4f} large")
    return found


@torch.no_grad()
def show(network: Network, out: Path, count: int) -> dict[str, dict[int, float]]:
    """All tables and pictures; returns the bounds."""
    denoisers: dict[str, Denoise] = {"exact": exact, "trained": PROCESS.denoiser(network)}
    out.mkdir(parents=True, exist_ok=True)
    show_samplers(denoisers, count).save(out / "samplers.png")
    show_guidance(denoisers, count).save(out / "guidance.png")
    return show_likelihood(denoisers)


def main(argv: list[str] | None = None) -> int:
    p = Parser(description="A diffusion model of eight Gaussians, with the truth beside it.")
    p.add_argument("--out", type=Path, default=Path("mixture_2d"), help="folder for the pictures")
    p.add_argument("--steps", type=int, default=1500, help="training steps")
    p.add_argument("--count", type=int, default=2000, help="samples in a picture")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    show(train(args.steps), args.out, args.count)
    print(f"\npictures in {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
