"""Pictures of the forward process: strips and animations of x_t, curves of alpha_bar and SNR."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from ldm.data.grid import sheet, to_pil
from ldm.diffusion.schedule import Discrete, Flow, Schedule
from ldm.rng import Rng
from ldm.web.chart import Curve
from ldm.web.gallery import Gallery

SCHEDULES: dict[str, Discrete | Flow] = {
    "linear": Discrete(betas="linear", beta_start=1e-4, beta_end=0.02),
    "scaled_linear": Discrete(),
    "zero_terminal_snr": Discrete(zero_terminal_snr=True),
    "cosine": Discrete(betas="cosine"),
    "sigmoid": Discrete(betas="sigmoid", beta_start=1e-4, beta_end=0.02),
    "flow": Flow(),
}
"""One of each shape; "quadratic" is "scaled_linear" by another name."""

_LABEL = 112  # pixels at the left of a strip with its name


def even_times(schedule: Schedule, count: int) -> list[float]:
    """`count` times from the cleanest to the noisiest, evenly spaced."""
    if count < 2:
        raise ValueError(f"frames must be at least 2, got {count}")
    span = schedule.last - schedule.first
    return [schedule.first + span * i / (count - 1) for i in range(count)]


def frames(image: Image.Image, schedule: Schedule, times: Sequence[float], seed: int = 0) -> list[Image.Image]:
    """x_t = alpha x_0 + sigma noise of a picture at each time, always with the same noise.

    Raises ValueError for times that the schedule has not.
    """
    if not times or min(times) < schedule.first or max(times) > schedule.last:
        raise ValueError(f"times must lie in [{schedule.first:g}, {schedule.last:g}] and not be empty, got {times}")
    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32).copy())
    x0 = (pixels / 127.5 - 1).permute(2, 0, 1)
    noise = Rng(seed, (0,)).normal("noising", x0.shape)[0]
    pairs = [schedule.at(float(t)) for t in times]
    return to_pil(torch.stack([alpha * x0 + sigma * noise for alpha, sigma in pairs]))


def strip(image: Image.Image, schedule: Schedule, times: Sequence[float], seed: int = 0) -> Image.Image:
    """`frames` side by side."""
    return sheet(frames(image, schedule, times, seed), len(times))


def strips(image: Image.Image, schedules: Mapping[str, Schedule], count: int, seed: int = 0) -> Image.Image:
    """A strip of `count` even times for each schedule, one below the other, with their names."""
    rows = [strip(image, schedule, even_times(schedule, count), seed) for schedule in schedules.values()]
    width, height = rows[0].size
    ground = Image.new("RGB", (_LABEL + width, len(rows) * (height + 2) - 2), "white")
    draw = ImageDraw.Draw(ground)
    for i, (name, row) in enumerate(zip(schedules, rows)):
        ground.paste(row, (_LABEL, i * (height + 2)))
        draw.text((4, i * (height + 2) + height // 2 - 5), name.replace("_", " "), fill="black")
    return ground


def gif(pictures: Sequence[Image.Image], milliseconds: int = 80) -> bytes:
    """An endless animation there and back; the ends stay for a while."""
    there = [picture.quantize(128) for picture in pictures]
    order = [*there, *there[-2:0:-1]]
    lengths = [milliseconds] * len(order)
    lengths[0] = lengths[len(there) - 1] = 8 * milliseconds
    out = io.BytesIO()
    order[0].save(out, "GIF", save_all=True, append_images=order[1:], duration=lengths, loop=0)
    return out.getvalue()


def levels(schedule: Schedule, count: int = 201) -> tuple[list[float], list[float], list[float]]:
    """(t / T from 0 to 1, alpha_bar = alpha^2, SNR in decibel) at even times; the SNR of an end may be infinite."""
    share, bar, decibel = [], [], []
    for i, t in enumerate(even_times(schedule, count)):
        alpha, sigma = schedule.at(t)
        share.append(i / (count - 1))
        bar.append(alpha**2)
        decibel.append(-math.inf if alpha == 0 else math.inf if sigma == 0 else 20 * math.log10(alpha / sigma))
    return share, bar, decibel


def page(image: Image.Image, schedules: Mapping[str, Schedule], count: int, seed: int = 0) -> str:
    """One self-contained page: a row of pictures for each schedule, and the curves of alpha_bar and SNR."""
    rows = {name: frames(image, schedule, even_times(schedule, count), seed) for name, schedule in schedules.items()}
    measured = {name: levels(schedule) for name, schedule in schedules.items()}
    gallery = Gallery("Noising", "x_t = alpha x_0 + sigma noise, from none to nothing else, for each schedule.")
    columns = [f"{i / (count - 1):.2g} T" for i in range(count)]
    gallery.section("Pictures", "The noise is the same in every row.").matrix(rows, columns, size=70)
    section = gallery.section("Levels")
    section.heading("alpha_bar").curve([Curve(n, t, bar) for n, (t, bar, _) in measured.items()], "t / T", "alpha_bar")
    section.heading("SNR").curve([Curve(n, t, snr) for n, (t, _, snr) in measured.items()], "t / T", "SNR, dB")
    return gallery.html()
