"""Converting a transformer takes the memory of a few tensors, also where they are joined and split."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import weights
from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.opened import shapes_of
from ldm.checkpoint.weights import Entry
from tests.families import make

# a child's ru_maxrss begins at its parent's size: the kernel's own mark, set back first, is read instead
PROGRAM = """
import re, sys
from pathlib import Path
from ldm.checkpoint.convert import convert
import ldm.models.text, open_clip
mark = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")
before = mark()
convert(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
print(mark() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("to", ["single", "diffusers"])
def test_converting_takes_less_than_the_largest_file(to: str, tmp_path: Path) -> None:
    parts = make("sd3_clip", tmp_path)
    kinds = {"network": parts.network, "autoencoder": parts.autoencoder, "text": parts.text}
    save_diffusers(tmp_path / "in", scheduler=parts.scheduler, **kinds)  # type: ignore[arg-type]
    own = {"num_layers": 12, "num_attention_heads": 48, "caption_projection_dim": 384, "dual_attention_layers": []}
    wide = replace(parts.network.config, **own | {"dual_attention_layers": ()})  # 239 MB of weights
    source = {k: Entry(v, torch.float32, lambda v=v: torch.zeros(v)) for k, v in shapes_of(wide).items()}
    file = tmp_path / "in/transformer/diffusion_pytorch_model.safetensors"
    weights.write_file(file, source)
    config = tmp_path / "in/transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    out = tmp_path / ("out.safetensors" if to == "single" else "out")
    argv = [sys.executable, "-c", PROGRAM, str(tmp_path / "in"), str(out), to]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    grown, size = int(done.stdout.split()[-1]), file.stat().st_size
    print(f"{to}: grew by {grown / 2**20:.0f} MB for a file of {size / 2**20:.0f} MB")
    assert size > 100 * 2**20
    assert grown < size / 2
