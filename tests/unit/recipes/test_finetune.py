"""Fine-tuning: pictures are checked, class pictures counted, the prior's weight meets min-SNR, mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ldm.cli.finetune import parser, tree
from ldm.config.load import decode, encode
from ldm.config.schema import RunConfig, load_run
from ldm.data.loader import DataConfig, Loader
from ldm.data.mixture import MixtureConfig
from ldm.diffusion.prediction import Epsilon
from ldm.diffusion.process import Process
from ldm.diffusion.weighting import MinSNR
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.pipeline import Settings
from ldm.recipes import pictures, prior
from ldm.recipes.dreambooth import DreamboothTask, _sources
from ldm.recipes.inversion import Concept, InversionTask
from ldm.recipes.prior import Prior
from ldm.recipes.text_to_image import Samples
from ldm.rng import Rng
from tests import miniature
from tests.unit.recipes.drawing import Fake

ROOT = Path(__file__).parents[3]


def folder(root: Path, *shapes: str, suffix: str = ".png") -> Path:
    root.mkdir(parents=True)
    for i, shape in enumerate(shapes):
        (root / f"{i}{suffix}").write_bytes(miniature.picture(("red", "green", "blue", "white")[i % 4], shape))
    return root


def test_what_is_wrong_with_pictures_is_said(tmp_path: Path) -> None:
    good = folder(tmp_path / "good", "cross", "dot", "bar", "square")
    assert pictures.check(good, 16).remarks == ()
    assert any("smaller than 64 pixels" in r and "0.png (16x16)" in r for r in pictures.check(good, 64).remarks)
    (good / "4.png").write_bytes((good / "0.png").read_bytes())
    Image.open(good / "1.png").save(good / "5.jpg", quality=98, subsampling=0)  # nearly the same pixels, another file
    (good / "6.png").write_bytes(b"not a picture")
    said = "\n".join(pictures.check(good, 16).remarks)
    assert "4.png looks the same as 0.png" in said
    assert "5.jpg looks the same as 1.png" in said
    assert "6.png: left out" in said
    few = folder(tmp_path / "few", "cross")
    assert any("only 1 picture(s)" in r for r in pictures.check(few, 16).remarks)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures found"):
        pictures.check(tmp_path / "empty", 16)
    with pytest.raises(ValueError, match="no such folder"):
        pictures.check(tmp_path / "missing", 16)


def test_shards_carry_the_method_s_captions(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", "cross", "dot", "bar")
    pictures.prepare(source, tmp_path / "out", ["a sks cross"], 16)
    loader = Loader(DataConfig(path=str(tmp_path / "out"), size=16, last="wrap"), seed=0, micro_batch=3)
    assert loader.batch(0, 0)["caption"] == ["a sks cross"] * 3
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    pictures.prepare(source, tmp_path / "out", ["a sks cross"], 16)  # again, as on resume
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds other pictures or captions"):
        pictures.prepare(source, tmp_path / "out", ["a sks dot"], 16)
    with pytest.raises(ValueError, match=r"has no caption; write one into 0\.txt"):
        pictures.prepare(source, tmp_path / "own", None, 16)


def test_class_pictures_are_counted_and_used_again(tmp_path: Path) -> None:
    own = folder(tmp_path / "class", "cross", "dot")
    config, fake = Prior(count=6, settings=Settings(batch=3)), Fake()
    make = lambda **more: prior.make(config, more.pop("prompt", "a dog"), own, "base", fake)  # type: ignore[arg-type]  # noqa: E731
    make()
    assert fake.drawn == [0, 1, 2, 3]  # two are there already
    (own / "class-00002.png").unlink()
    make()
    assert fake.drawn == [0, 1, 2, 3, 2]
    make()
    assert len(fake.drawn) == 5
    with pytest.raises(ValueError, match="class pictures of other prompt: 'a dog'"):
        make(prompt="a cat")


def test_each_sample_has_its_own_weight_of_time_and_of_its_source() -> None:
    """Closed form: a network that answers zero errs by mean(noise^2), times min(SNR, 5) / SNR, times the source's."""

    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            return x * 0 + self.p

    vae = Autoencoder(AutoencoderConfig(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, sample_size=4))
    process = Process(prediction=Epsilon(), weighting=MinSNR(gamma=5.0))
    encode_text = lambda texts: {"text": torch.zeros(len(texts), 2, 3)}  # noqa: E731
    objective = DenoiseObjective(Zero(), process, LatentCodec.of(vae), encode_text, DenoiseOptions(drop=0.0))
    weight = torch.tensor([1.0, 0.3, 1.0, 0.3, 1.0, 0.3])
    positions = list(range(6))
    batch = {"moments": torch.zeros(6, 8, 4, 4), "caption": ["x"] * 6, "weight": weight, "position": positions}
    loss, _ = objective(batch, Rng.of(3, positions))
    rng = Rng.of(3, positions)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bar = (1 - betas).cumprod(0)[process.times(rng.uniform("time")).long()]
    snr = bar / (1 - bar)
    errors = rng.normal("noise", (4, 4, 4)).double().square().mean((1, 2, 3))
    assert loss.item() == pytest.approx(float((weight * snr.clamp(max=5) / snr * errors).mean()), rel=1e-5)


def test_text_that_trains_is_encoded_with_gradients_and_dropped_ones_are_the_empty_prompt() -> None:
    table = nn.Embedding(2, 3)
    seen: list[list[str]] = []

    def encode_text(texts: Any) -> dict[str, Tensor]:
        seen.append(list(texts))
        return {"text": table(torch.tensor([[int(t != "")] for t in texts]))}

    vae = Autoencoder(AutoencoderConfig(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, sample_size=4))
    args = (Process(), LatentCodec.of(vae), encode_text, DenoiseOptions(drop=0.5))
    batch = {"caption": ["x"] * 8}
    rng = Rng.of(0, list(range(8)))
    live = DenoiseObjective(nn.Linear(1, 1), *args, live=True).cond(batch, rng)["text"]
    frozen = DenoiseObjective(nn.Linear(1, 1), *args).cond(batch, rng)["text"]
    assert torch.equal(live, frozen)
    assert live.requires_grad
    assert not frozen.requires_grad
    assert seen[1].count("") == int((rng.uniform("drop") < 0.5).sum())


COMMANDS = {
    "dreambooth": "dreambooth --class dog",
    "dreambooth_lora": "dreambooth --class dog --lora",
    "dreambooth_pivotal": "dreambooth --class dog --pivotal",
    "textual_inversion": "textual-inversion --initializer-token dog --num-vectors 2",
    "lora": "lora --prompt a_tree --prompt a_red_apple --prompt a_dog --prompt a_rocket",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_writes_what_the_config_says(name: str) -> None:
    images = "pictures/style" if name == "lora" else "pictures/subject"
    words = [w.replace("_", " ") if w.startswith("a_") else w for w in COMMANDS[name].split()]
    args = parser().parse_args([*words, "--images", images, "--out", f"runs/{name}", "--size", "64"])
    assert encode(decode(RunConfig, tree(args))) == encode(load_run(ROOT / "configs" / "finetune" / f"{name}.yaml"))


def test_what_is_wrong_is_said_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "source", "cross", "cross")
    (source / "0.png").write_bytes((source / "1.png").read_bytes())
    pictures.prepare(source, tmp_path / "out", ["a sks cross"], 64)
    said = "".join(capsys.readouterr())
    for words in ("smaller than 64 pixels", "only 2 picture(s)", "1.png looks the same as 0.png"):
        assert words in said


@pytest.mark.parametrize(("base", "guidance"), [("emoji", 3.0), ("models/stable-diffusion", 7.5)])
def test_class_pictures_are_drawn_as_the_base_needs(base: str, guidance: float) -> None:
    argv = ["dreambooth", "--class", "dog", "--images", "x", "--base", base, "--size", "64", "--class-prompt", "my dog"]
    task = decode(RunConfig, tree(parser().parse_args(argv))).task
    assert isinstance(task, DreamboothTask)
    assert task.prior is not None
    assert task.prior.settings.guidance == task.samples.settings.guidance == guidance
    assert task.class_prompt == "my dog"
    none = decode(RunConfig, tree(parser().parse_args([*argv, "--no-prior"]))).task
    assert isinstance(none, DreamboothTask)
    assert none.prior is None


def test_dreambooth_s_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"identifier ' ' and noun 'dog' must not be empty"):
        DreamboothTask(images=tmp_path, identifier=" ", noun="dog")
    with pytest.raises(ValueError, match="count must be at least 1"):
        Prior(count=0)
    one = DataConfig(path="x", size=16)
    with pytest.raises(ValueError, match=r"1 source\(s\), expected 2: the subject and, with task\.prior, the class"):
        _sources(DreamboothTask(images=tmp_path, noun="dog"), one)
    two = decode(MixtureConfig, {"kind": "mixture", "sources": [{"data": {"path": "x", "size": 16}}] * 2})
    with pytest.raises(ValueError, match=r"2 source\(s\), expected 1: the subject, since task\.prior is null"):
        _sources(DreamboothTask(images=tmp_path, noun="dog", prior=None), two)


def test_inversion_s_mistakes_are_named() -> None:
    def task(prompts: tuple[str, ...] = (), **concept: Any) -> InversionTask:
        own = Concept(**{"token": "<x>", "images": Path("x"), **concept})
        return InversionTask(concepts=(own,), samples=Samples(prompts=prompts))

    with pytest.raises(ValueError, match=r"templates: 'a picture' has no \{\}"):
        task(templates=("a picture",))
    with pytest.raises(ValueError, match=r"samples\.prompts: 'a tree' names none of the new tokens \['<x>'\]"):
        task(prompts=("a <x>", "a tree"))
    with pytest.raises(ValueError, match="vectors"):
        task(vectors=0)
    assert task(learn="style").concepts[0].captions[1] == "in the style of <x>"
