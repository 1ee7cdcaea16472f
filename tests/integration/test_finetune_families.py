"""`ldm finetune` on models of SDXL's and SD 2.x's form, tiny and random: the exports draw our pictures in diffusers."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.checkpoint.embedding_files import read_embeddings
from ldm.cli.finetune import main as finetune
from ldm.pipeline import Settings, TextToImage
from ldm.rng import Rng
from tests import miniature, ranks
from tests.parity.test_diffusers_folder import make, save

torch.set_num_threads(1)
FEW = ("task.samples.settings.steps=2", "train.log.tensorboard=false", "train.threads=1")
DRAW = Settings(sampler="ddim", steps=10, guidance=5.0, seed=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures, and the models `sdxl` and `sd2`, the latter predicting v."""
    folder = tmp_path_factory.mktemp("families")
    (folder / "subject").mkdir()
    for i, color in enumerate(("red", "green", "blue", "white")):
        (folder / "subject" / f"{i}.png").write_bytes(miniature.picture(color, "cross"))
    (folder / "subject" / "4.png").write_bytes(miniature.picture("red", "bar"))
    for family in ("sdxl", "sd2"):
        parts = make(family)
        parts.scheduler |= {"prediction_type": "v_prediction"} if family == "sd2" else {}
        save(parts, folder / family)
    return folder


def command(argv: list[str]) -> int:
    """The command in a rank of its own, its progress bars silent."""
    torch.use_deterministic_algorithms(True)
    with contextlib.redirect_stderr(io.StringIO()):
        return finetune(argv)


def tune(root: Path, family: str, name: str, *options: str, lr: float, world: int = 1) -> Path:
    """Run the command; the run folder."""
    out = root / f"{family}-{name}"
    given = ["--images", root / "subject", "--base", root / family, "--out", out, "--steps", 3, "--lr", lr]
    argv = [options[0], *map(str, given), "--precision", "fp32", "--zero-stage", "3", *options[1:]]
    few = [*FEW, "task.prior.settings.steps=2"] if "dreambooth" in options and "--no-prior" not in options else FEW
    for change in few:
        argv += ["--set", change]
    assert ranks.run(command, world, argv, timeout=400) == [0] * world
    return out


def theirs(root: Path, family: str, folder: Path | None = None) -> Any:
    """diffusers' pipeline of a folder, by default of the base."""
    import diffusers

    xl = family == "sdxl"
    cls = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    pipe = cls.from_pretrained(folder or root / family, **({"add_watermarker": False} if xl else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_theirs(pipe: Any, prompt: str) -> Tensor:
    """Their picture of the noise that ours has."""
    noise = Rng(DRAW.seed, (0,)).normal("start", (4, 8, 8))
    settings: dict[str, Any] = {"num_inference_steps": DRAW.steps, "guidance_scale": DRAW.guidance}
    return pipe(prompt, latents=noise, height=16, width=16, output_type="pt", **settings).images * 2 - 1


def same(pipe: Any, run: Path, base: Path, prompt: str, plain: str) -> None:
    """Their picture is ours to 1e-3, and tells itself from the base model's by much more than the two differ."""
    ours = TextToImage.load(run).sample([prompt], settings=DRAW)
    before = TextToImage.load(base).sample([plain], settings=DRAW)
    error, change = (ours - draw_theirs(pipe, prompt)).abs().max(), (ours - before).abs().max()
    assert error < min(1e-3, 0.05 * float(change))
    assert change > 1e-3


BOOTH = ("dreambooth", "--identifier", "sks", "--class", "cross", "--num-class-images", "3")


@pytest.mark.parametrize("family", ["sdxl", "sd2"])
def test_dreambooth_lora(family: str, root: Path) -> None:
    """On the U-Net and all towers; diffusers' file through PEFT, and kohya's."""
    options = ("--lora", "--rank", "3", "--alpha", "5", "--train-text-encoder")
    run = tune(root, family, "lora", *BOOTH, *options, lr=0.1)
    tensors = load_file(run / "export" / "pytorch_lora_weights.safetensors")
    towers = {k.partition(".")[0] for k in tensors}
    assert towers == {"unet", "text_encoder"} | ({"text_encoder_2"} if family == "sdxl" else set())
    assert all(v.abs().max() > 0 for v in tensors.values())
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        pipe = theirs(root, family)
        pipe.load_lora_weights(run / "export", weight_name=name)
        same(pipe, run, root / family, "a sks cross", "a sks cross")


@pytest.mark.parametrize("family", ["sdxl", pytest.param("sd2", marks=pytest.mark.slow)])
def test_full_dreambooth(family: str, root: Path) -> None:
    """All weights of the U-Net and the towers; the export is a whole folder of diffusers."""
    run = tune(root, family, "full", *BOOTH, "--train-text-encoder", lr=0.003)
    base, tuned = (TextToImage.load(x) for x in (root / family, run))
    for a, b in zip(base.text, tuned.text, strict=True):
        before, after = a.model.state_dict(), b.model.state_dict()
        moved = {k for k in before if not torch.equal(before[k], after[k])}
        assert "token_embedding.weight" in moved
    pipe = theirs(root, family, run / "export")
    assert (family == "sd2") == (pipe.scheduler.config.prediction_type == "v_prediction")
    same(pipe, run, root / family, "a sks cross", "a sks cross")


@pytest.mark.parametrize("family", ["sdxl", "sd2"])
def test_textual_inversion(family: str, root: Path) -> None:
    """Three vectors in every tower, from two words; a prompt names the token once."""
    options = ("--token", "<toy>", "--initializer-token", "red", "dog", "--num-vectors", "3", "--max-norm", "0")
    run = tune(root, family, "inversion", "textual-inversion", *options, lr=2.0)
    base, pipe = TextToImage.load(root / family), theirs(root, family)
    found = read_embeddings(next((run / "export" / "a1111").iterdir()), "<toy>")["<toy>"]
    assert [tuple(rows.shape) for rows in found] == [(3, tower.width) for tower in base.text]
    for tower, rows in zip(base.text, found, strict=True):
        start = tower.model.token_embedding.weight[[tower.tokenizer.encode(w)[0] for w in ("red", "dog", "red")]]
        assert ((rows - start).abs().amax(1) > 1e-3).all()  # every vector of every tower moved
    if family == "sdxl":
        for rows, k in zip(found, ("", "_2"), strict=True):
            parts = {"tokenizer": getattr(pipe, "tokenizer" + k), "text_encoder": getattr(pipe, "text_encoder" + k)}
            pipe.load_textual_inversion(rows, token="<toy>", **parts)
    else:
        pipe.load_textual_inversion(run / "export", weight_name="learned_embeds.safetensors")
    same(pipe, run, root / family, "a red <toy>, cross", "a red dog, cross")
