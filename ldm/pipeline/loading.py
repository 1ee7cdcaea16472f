"""From a model's name or files to the parts that draw, and how they are meant to draw."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict

import torch
from typing_extensions import Unpack  # typing has it from Python 3.11 on; torch needs the package

from ldm.checkpoint import control_files, ip_adapter_files, students
from ldm.checkpoint.convert import Components, open_model
from ldm.checkpoint.scheduler_classes import OwnSampler
from ldm.checkpoint.schedulers import scheduler_from_diffusers
from ldm.diffusion.augmentation import NoiseAugmentation
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Flow
from ldm.models.families import Family, family_of
from ldm.models.network import Network
from ldm.models.shipped import check_draws, named
from ldm.models.text import TextEncoder, TextPrecision, TextTower
from ldm.models.vae.latents import LatentCodec

log = logging.getLogger(__name__)


class Which(TypedDict, total=False):
    """Which weights are read: a folder's `variant` ("fp16"), a single file's averaged ones; what these predict."""

    variant: str
    ema: bool
    prediction: str


@dataclass(frozen=True)
class Loaded:
    """The parts of a model on the CPU, its process and sampler, and adapter files to put on them."""

    network: Network
    codec: LatentCodec
    text: list[TextEncoder]
    process: Process
    spacing: str | None
    offset: int
    end: Literal["data", "first"] | None
    student: students.FewSteps | None
    family: Family
    own: OwnSampler | None
    loras: tuple[Path, ...] = ()
    embeddings: tuple[Path, ...] = ()
    augmentation: NoiseAugmentation | None = None


def load_parts(
    source: str | Path,
    *,
    lenient: bool = False,
    text: str | Path | None = None,
    vae: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    text_precision: TextPrecision | None = None,
    **which: Unpack[Which],
) -> Loaded:
    """From a shipped model's name (emoji), a run folder, a diffusers folder, a single file or a hub id.

    `dtype` is of the network's and, without a `text_precision`, the text encoders' weights, the autoencoder's are
    float32; `lenient` leaves unknown tensors out and names them; `text` and `vae` hold what a transformer's file lacks.
    Raises ValueError when it is none of these, and for a precision that its text encoders cannot have.
    """
    found = named(source)
    check_draws(source)
    for folder in (found, found / "export"):
        if (folder / "adapter.json").is_file():
            return _adapted(folder, lenient, dtype, text_precision, which)
    if control_files.folder_of(found) is not None and not (found / "model_index.json").is_file():
        raise ValueError(
            f"{source}: a ControlNet; draw under it with --control {source}:PICTURE and its base as the model"
        )
    if ip_adapter_files.ip_adapter_in(found) not in (None, found) and not (found / "model_index.json").is_file():
        raise ValueError(f"{source}: an IP-Adapter; draw with it by --image-prompt PICTURE --ip-adapter {source} and "
                         "its base as the model")  # fmt: skip
    if (found / "checkpoints").is_dir() and not (found / "export" / "model_index.json").is_file():
        raise ValueError(f"run {str(source)!r}: not exported yet; the export is written when training ends")
    own = found / "export" if (found / "export").is_dir() else found
    parts = open_model(own, lenient=lenient, text=text, vae=vae, **which).load(dtype, torch.float32, text_precision)
    family = family_of(parts.network.config, parts.scheduler)
    how = scheduler_from_diffusers(parts.scheduler, grid=family.grid)
    network = parts.network.eval().requires_grad_(False)
    parts.codec.autoencoder.eval().requires_grad_(False)
    if how.unlike:
        log.warning("%s: its own scheduler does not draw here, the samplers do (%s)", source, how.unlike)
    return Loaded(
        network, parts.codec, parts.text,
        Process(schedule=how.schedule, prediction=how.prediction, variance=_variance(parts, how.variance)),
        spacing=how.spacing, offset=how.offset, end="data" if how.last_alpha_one else "first",
        family=family, student=students.few_steps(parts.scheduler, guided=network.guidance_width is None), own=how.own,
        augmentation=parts.augmentation,
    )  # fmt: skip


def _variance(parts: Components, told: Literal["fixed", "learned"]) -> Literal["fixed", "learned"]:
    """Learned where the network answers twice the latents' channels, which PixArt's scheduler does not tell."""
    return "learned" if parts.network.out_channels == 2 * parts.codec.channels else told


def _adapted(
    folder: Path, lenient: bool, dtype: torch.dtype, text_precision: TextPrecision | None, which: Which
) -> Loaded:
    """The base model of a fine-tuning with its adapter's files."""
    told = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
    base = load_parts(told["base"], lenient=lenient, dtype=dtype, text_precision=text_precision, **which)
    return replace(
        base,
        loras=(*base.loras, *(folder / name for name in told["loras"])),
        embeddings=(*base.embeddings, *(folder / name for name in told["embeddings"])),
        student=students.beside(folder, guided=base.network.guidance_width is None),
    )


def family_with(network: Network, process: Process) -> Family:
    """The family of a network that came without a scheduler's config, of which the process tells what matters."""
    schedule = process.schedule
    dynamic = isinstance(schedule, Flow) and schedule.dynamic is not None
    return family_of(network.config, {"shift": getattr(schedule, "shift", None), "use_dynamic_shifting": dynamic})


def habit_of(family: Family, network: Network, text: Sequence[TextEncoder]) -> tuple[str, int, float]:
    """Sampler, steps, guidance where nothing else is asked for: a published transformer's, a Turbo's, or ours."""
    if network.component != "transformer" and family.guidance != 1:
        return students.PLAIN
    if network.component == "transformer" and all(isinstance(encoder, TextTower) for encoder in text):
        return students.PLAIN
    return family.sampler, family.steps, family.guidance
