"""Tiny random models as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.schedulers import scheduler_to_diffusers
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Discrete
from ldm.models.presets import AUTOENCODERS, TEXTS, UNETS
from ldm.models.text import TextTower
from ldm.models.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder


def tiny_model(folder: Path, schedule: Discrete, prediction: Prediction, **changes: Any) -> Path:
    """A diffusers folder of tiny random networks; `changes` are other parts."""
    torch.manual_seed(2)
    parts: dict[str, Any] = {
        "network": UNet(UNETS["tiny"]),
        "autoencoder": Autoencoder(AUTOENCODERS["tiny"]),
        "text": [TextTower(TEXTS["tiny"][0])],
        "scheduler": scheduler_to_diffusers(schedule, prediction),
    }
    save_diffusers(folder, **parts | changes)
    return folder
