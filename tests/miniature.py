"""A whole project in miniature: captioned pictures of 16 px, an autoencoder, a CLIP, and configs that train on them."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.folders import write_module
from ldm.checkpoint.schedulers import scheduler_to_diffusers
from ldm.config.load import decode, encode
from ldm.data.manifest import Manifest
from ldm.data.write import ShardWriter
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.schedule import Discrete
from ldm.models.text import ClipConfig, build_clip
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.recipes.sources import load_autoencoder, load_towers

SIZE = 16
VAE = AutoencoderConfig(
    block_out_channels=(8, 8),
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=SIZE,
    scaling_factor=0.9,
    mid_block_add_attention=False,
)
CLIP = ClipConfig(
    embed_dim=16,
    context_length=12,
    text_width=16,
    text_heads=2,
    text_layers=2,
    image_size=SIZE,
    patch_size=8,
    vision_width=16,
    vision_layers=1,
    vision_head_width=8,
)
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}
SHAPES = ("square", "cross", "bar", "dot")


def picture(color: str, shape: str) -> bytes:
    """A shape in a colour on grey, as PNG."""
    pixels = np.full((SIZE, SIZE, 3), 90, np.uint8)
    where = {
        "square": np.s_[3:13, 3:13],
        "cross": np.s_[6:10, :],
        "bar": np.s_[:, 5:11],
        "dot": np.s_[6:10, 6:10],
    }[shape]
    pixels[where] = COLORS[color]
    if shape == "cross":
        pixels[:, 6:10] = COLORS[color]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def crosses(folder: Path) -> Path:
    """Three pictures in a new folder, each with its caption beside it; the folder."""
    folder.mkdir()
    for color in ("red", "green", "blue"):
        (folder / f"{color}.png").write_bytes(picture(color, "cross"))
        (folder / f"{color}.txt").write_text(f"a {color} cross")
    return folder


def data(folder: Path) -> Path:
    """16 pictures in the split train, 8 of them again in heldout."""
    shards = []
    things = [(c, s) for c in COLORS for s in SHAPES]
    for split, chosen in (("train", things), ("heldout", things[::2])):
        with ShardWriter(folder, split, split, max_samples=5) as writer:
            for i, (color, shape) in enumerate(chosen):
                record = {"captions": [[f"a {color} {shape}", 3], [f"{shape} in {color}", 1]]}
                writer.add(f"{i:03d}-{color}", {"png": picture(color, shape), "json": json.dumps(record).encode()})
        shards += writer.shards
    Manifest(name="miniature", shards=tuple(shards), folder=folder).write()
    return folder


def vae(folder: Path) -> Path:
    """A random autoencoder as `ldm train` exports one."""
    torch.manual_seed(11)
    write_module(folder / "vae", Autoencoder(VAE).state_dict(), {"_class_name": "AutoencoderKL", **encode(VAE)})
    return folder


def clip(folder: Path) -> Path:
    """A random CLIP as `ldm train` exports one."""
    torch.manual_seed(12)
    model: Any = build_clip(CLIP)
    write_module(folder / "clip", model.state_dict(), {"_class_name": "CLIP", **encode(CLIP)})
    return folder


def train(**changes: Any) -> dict[str, Any]:
    """The part `train` of a config."""
    return {
        "steps": 6,
        "batch": 4,
        "optim": {"lr": 2.0e-3, "warmup": 2, "decay": "cosine"},
        "engine": {"zero_stage": 2, "precision": "fp32"},
        "ema": {"decay": 0.9},
        "checkpoint": {"every": 2, "keep": 2},
        "log": {"every": 1, "tensorboard": False},
        "threads": 1,
    } | changes


def text_to_image(root: Path, **changes: Any) -> dict[str, Any]:
    """A config on the miniature data and models below `root`."""
    task = {
        "kind": "text_to_image",
        "vae": str(root / "autoencoder"),
        "text": str(root / "towers"),
        "network": {"kind": "unet"} | UNET,
        "process": {"prediction": {"kind": "v"}, "weighting": {"kind": "min_snr"}},
        "samples": {"prompts": ["a red dot", "", "a blue bar"], "every": 4, "settings": {"steps": 2, "guidance": 2.0}},
    }
    return {"name": "mini", "out": str(root / "run"), "task": task | changes, "data": _data(root), "train": train()}


def autoencoder(root: Path) -> dict[str, Any]:
    """Two steps without the adversary, the rest with it."""
    task = {
        "kind": "autoencoder",
        "model": {k: v for k, v in encode(VAE).items() if v is not None},
        "discriminator": {"channels": [8, 8]},
        "loss": {"adversarial_start": 2, "kl": 1.0e-3},
        "perceptual_network": "none",
        "validate_every": 4,
    }
    return {"name": "mini", "out": str(root / "run"), "task": task, "data": _data(root), "train": train()}


def contrastive(root: Path) -> dict[str, Any]:
    """CLIP training."""
    task = {"kind": "clip", "model": encode(CLIP), "validate_every": 4}
    return {"name": "mini", "out": str(root / "run"), "task": task, "data": _data(root), "train": train()}


def teacher(root: Path, prediction: str = "v") -> Path:
    """A random model of the miniature parts as a diffusers folder, `root`/teacher; no weight of it is zero."""
    torch.manual_seed(13)
    unet = UNet(decode(UNetConfig, UNET))
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1) if p.ndim == 1 else torch.nn.init.xavier_normal_(p)
    scheduler = scheduler_to_diffusers(Discrete(zero_terminal_snr=prediction == "v"), PREDICTIONS[prediction])
    parts = {"autoencoder": load_autoencoder(str(root / "autoencoder")), "text": load_towers(str(root / "towers"))}
    save_diffusers(root / "teacher", network=unet, scheduler=scheduler, **parts)
    return root / "teacher"


def distill(root: Path, method: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A distillation of `teacher(root)`; `changes` are of the task."""
    sampler = {"progressive": "ddim", "tcd": "tcd"}.get(method["kind"], "lcm")
    task = {
        "kind": "distill",
        "teacher": str(root / "teacher"),
        "method": method,
        "guidance_embedding": 32,
        "samples": {"prompts": ["a red dot", "a blue bar"], "every": 4, "settings": {"sampler": sampler, "steps": 2}},
    }
    return {"name": "mini", "out": str(root / "run"), "task": task | changes, "data": _data(root), "train": train()}


def _data(root: Path) -> dict[str, Any]:
    return {"path": str(root / "data"), "size": SIZE}


def project(root: Path) -> Path:
    """Data, autoencoder and CLIP below `root`."""
    data(root / "data")
    vae(root / "autoencoder")
    clip(root / "towers")
    return root


def write(config: dict[str, Any], path: Path) -> Path:
    """A config file."""
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def stop_after_two_steps(process: subprocess.Popen[str], run: Path) -> None:
    """SIGTERM to a training once two of its steps are in the log."""
    log, end = run / "log" / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        if log.is_file() and log.read_text().count("\n") >= 2:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
