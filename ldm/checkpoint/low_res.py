"""`low_res_scheduler` and `max_noise_level` of an upscaler's folder: the noise on the small picture that it is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoint.schedulers import scheduler_from_diffusers, scheduler_to_diffusers
from ldm.checkpoint.settings import read_json, write_json
from ldm.diffusion.augmentation import NoiseAugmentation
from ldm.diffusion.prediction import Epsilon
from ldm.diffusion.schedule import Discrete

PART, LEVELS, CLASS = "low_res_scheduler", "max_noise_level", "DDPMScheduler"


def write(folder: Path, augmentation: NoiseAugmentation | None) -> None:
    """The scheduler's own folder."""
    schedule = (augmentation or NoiseAugmentation()).schedule
    (folder / PART).mkdir()
    config = scheduler_to_diffusers(schedule, Epsilon()) | {"_class_name": CLASS, "clip_sample": True}
    write_json(folder / PART / "scheduler_config.json", config)


def read(folder: Path, index: Mapping[str, Any]) -> NoiseAugmentation:
    """Of a folder and its index. Raises ValueError where the scheduler is missing or is none of noise levels."""
    schedule = scheduler_from_diffusers(read_json(folder / PART / "scheduler_config.json")).schedule
    if not isinstance(schedule, Discrete):
        raise ValueError(f"{folder}: {PART} is a flow's; expected one of noise levels, such as {CLASS}")
    levels = index.get(LEVELS)
    usual = min(NoiseAugmentation().levels, schedule.steps)
    # diffusers takes levels up to this one and itself, which training does not draw
    return NoiseAugmentation(schedule=schedule, levels=usual if levels is None else min(levels, schedule.steps))
