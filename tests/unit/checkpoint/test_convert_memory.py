"""Converting a model takes the memory of a tensor, not of a file: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import weights
from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.opened import shapes_of
from ldm.checkpoint.schedulers import scheduler_to_diffusers
from ldm.checkpoint.weights import Entry
from ldm.diffusion.prediction import Epsilon
from ldm.diffusion.schedule import Discrete
from ldm.models.presets import AUTOENCODERS, UNETS
from ldm.models.text import TextConfig, TextTower
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae.autoencoder import Autoencoder

# 129 MB of weights in the shape of SD 1.x, in one file
WIDE = UNetConfig(
    sample_size=8, block_out_channels=(64, 128, 256, 256), layers_per_block=2, cross_attention_dim=32,
    attention_head_dim=8,
)  # fmt: skip
PROGRAM = """
import resource, sys
from pathlib import Path
from ldm.checkpoint.convert import convert
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
convert(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
print(peak() - before)
"""


@pytest.mark.parametrize("to", ["compvis", "diffusers"])
def test_converting_takes_less_than_the_largest_file(to: str, tmp_path: Path) -> None:
    tower = TextTower(TextConfig(width=32, heads=2, layers=2, context_length=16, vocab_size=4096, bpe="emoji"))
    scheduler = scheduler_to_diffusers(Discrete(), Epsilon())
    parts = {"autoencoder": Autoencoder(AUTOENCODERS["tiny"]), "text": [tower], "scheduler": scheduler}
    save_diffusers(tmp_path / "in", network=UNet(UNETS["tiny"]), **parts)  # type: ignore[arg-type]
    shapes = shapes_of(WIDE)
    source = {k: Entry(v, torch.float32, lambda v=v: torch.zeros(v)) for k, v in shapes.items()}
    file = tmp_path / "in/unet/diffusion_pytorch_model.safetensors"
    weights.write_file(file, source)
    config = tmp_path / "in/unet/config.json"
    own = {"block_out_channels": list(WIDE.block_out_channels), "layers_per_block": 2, "norm_num_groups": 32,
           "attention_head_dim": 8, "down_block_types": list(WIDE.down_block_types),
           "up_block_types": list(WIDE.up_block_types)}  # fmt: skip
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    argv = [
        sys.executable,
        "-c",
        PROGRAM,
        str(tmp_path / "in"),
        str(tmp_path / ("out.safetensors" if to == "compvis" else "out")),
        to,
    ]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    grown, size = int(done.stdout.split()[-1]), file.stat().st_size
    print(f"{to}: grew by {grown / 2**20:.0f} MB for a file of {size / 2**20:.0f} MB")
    assert grown < 1.3 * size
