"""`ldm edit`: each verb writes what the Python call gives; mistakes end in one line. And the example of all methods."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import editing
from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.schedulers import scheduler_to_diffusers
from ldm.cli.__main__ import main
from ldm.diffusion import Discrete, V
from ldm.models.autoencoder import Autoencoder
from ldm.models.presets import AUTOENCODERS, TEXTS, UNETS
from ldm.models.text import TextTower
from ldm.models.unet import UNet
from ldm.pipeline import Settings, TextToImage

STEPS = 2
CHANGES = ("--cross", "0.5", "--own", "0.5", "--local", "cat", "dog", "--weight", "red=2")
SETTINGS = Settings(sampler="ddim", steps=STEPS, guidance=2.0, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("model")
    unet = UNet(UNETS["tiny"])
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    save_diffusers(
        folder,
        unet=unet,
        autoencoder=Autoencoder(AUTOENCODERS["tiny"]),
        text=[TextTower(TEXTS["tiny"][0])],
        scheduler=scheduler_to_diffusers(Discrete(zero_terminal_snr=True), V()),
    )
    return folder


@pytest.fixture(scope="module")
def pipe(model: Path) -> TextToImage:
    return TextToImage.load(model)


@pytest.fixture(scope="module")
def files(pipe: TextToImage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, a mask of its left half and one of another size."""
    folder = tmp_path_factory.mktemp("files")
    side = pipe.latent_shape(None)[1] * pipe.codec.factor
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / "in.png")
    mask = Image.new("L", (side, side), 0)
    mask.paste(255, (0, 0, side // 2, side))
    mask.save(folder / "mask.png")
    mask.resize((4, 4)).save(folder / "small.png")
    (folder / "text.png").write_text("no picture")
    return folder


def run(model: Path, files: Path, out: Path, *argv: str) -> dict[str, Image.Image]:
    words = [str(files / a[1:]) if a.startswith("@") else a for a in argv]
    options = ["--model", str(model), "--steps", str(STEPS), "--guidance", "2", "--seed", "5", "--out", str(out)]
    assert main(["edit", *words, *options]) == 0
    return {path.stem: Image.open(path) for path in sorted(out.iterdir())}


def _in(files: Path, name: str = "in.png") -> Image.Image:
    return Image.open(files / name)


def _prompt(pipe: TextToImage, files: Path) -> dict[str, Image.Image]:
    change = editing.Change(cross=0.5, own=0.5, local=("cat", "dog"), weights={"red": 2.0})
    source, target = editing.edit(pipe, "a red cat", "a red dog", change=change, settings=SETTINGS)
    return {"source": source, "target": target}


def _maps(pipe: TextToImage, files: Path) -> dict[str, Image.Image]:
    picture, words = editing.attention_maps(pipe, "a red cat", settings=SETTINGS)
    return {"picture": picture, **{f"word-{w}": image for w, image in words.items()}}


def _again(pipe: TextToImage, files: Path) -> dict[str, Image.Image]:
    noise = editing.invert(pipe, _in(files), "a cat", settings=SETTINGS, refine=1)
    return {"edited": editing.redraw(pipe, noise, "a dog", settings=SETTINGS)[0]}


Wanted = Callable[[TextToImage, Path], dict[str, Image.Image]]
VERBS: list[tuple[tuple[str, ...], Wanted]] = [
    (
        ("img2img", "@in.png", "a cat", "--strength", "0.5", "--count", "2"),
        lambda pipe, files: dict(
            zip(
                ("0000", "0001"),
                editing.img2img(pipe, _in(files), "a cat", strength=0.5, settings=SETTINGS, count=2),
            )
        ),
    ),
    (
        ("inpaint", "@in.png", "@mask.png", "a cat"),
        lambda pipe, files: {
            "0000": editing.inpaint(pipe, _in(files), _in(files, "mask.png"), "a cat", settings=SETTINGS)[0]
        },
    ),
    (("invert", "@in.png", "--prompt", "a cat", "--target", "a dog", "--refine", "1"), _again),
    (
        ("prompt", "a red cat", "a red dog", *CHANGES),
        _prompt,
    ),
    (("maps", "a red cat"), _maps),
]


@pytest.mark.parametrize(("argv", "wanted"), VERBS, ids=[argv[0] for argv, _ in VERBS])
def test_a_verb_writes_what_the_call_gives(
    argv: tuple[str, ...], wanted: Wanted, model: Path, pipe: TextToImage, files: Path, tmp_path: Path
) -> None:
    found, expected = run(model, files, tmp_path / "out", *argv), wanted(pipe, files)
    assert set(found) == set(expected)
    for name, picture in expected.items():
        assert np.array_equal(np.asarray(found[name]), np.asarray(picture)), name


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("img2img", "@in.png", "a cat", "--strength", "0"), "strength must lie strictly between 0"),
        (("img2img", "@in.png", "a cat", "--strength", "1"), "strength must lie strictly between 0"),
        (("img2img", "@text.png", "a cat"), "not a readable picture"),
        (("inpaint", "@in.png", "@small.png", "a cat"), "mask: 4 x 4 pixels, the picture has"),
        (("invert", "@in.png", "--refine", "-1"), "refine must be at least 0"),
        (("prompt", "a cat", "a dog", "--weight", "cat"), "expected WORD=FACTOR"),
        (("prompt", "a cat", "a dog", "--weight", "bird=2"), "word 'bird' is not in the prompt"),
        (("prompt", "a cat", "a dog", "--local", "bird"), "none of ['bird'] is a word of 'a cat'"),
        (("prompt", "a cat", "a dog", "--cross", "2"), "cross must lie in [0, 1], got 2.0"),
        (("maps", "a cat", "--steps", "0"), "steps must be at least 1"),
        (("maps", "a cat", "--steps", "1001"), "steps must be at most the schedule's 1000"),
    ],
)
def test_mistakes_end_in_one_line(
    argv: tuple[str, ...], says: str, model: Path, files: Path, tmp_path: Path, capsys: Any
) -> None:
    words = [str(files / a[1:]) if a.startswith("@") else a for a in argv]
    steps = [] if "--steps" in words else ["--steps", "2"]
    assert main(["edit", *words, *steps, "--model", str(model), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_the_example_shows_every_method(tmp_path: Path, capsys: Any) -> None:
    path = Path(__file__).parents[3] / "examples" / "editing.py"
    spec = importlib.util.spec_from_file_location("editing_example", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(["--out", str(tmp_path), "--steps", "2"]) == 0
    names = {p.stem for p in tmp_path.glob("*.png")}
    assert names == {m.__name__ for m in example.METHODS} | {"sheet"}
    kept = Image.open(tmp_path / "inpainting.png")
    side = kept.height
    before, after = (np.asarray(kept)[side // 2 + 8 :, x : x + side] for x in (0, 2 * (side + 2)))
    assert np.array_equal(before, after), "the black half of the mask stays"


def test_a_mask_s_transparent_part_is_kept(model: Path, files: Path, tmp_path: Path, capsys) -> None:
    """Transparent white is not painted (Mikubill/sd-webui-controlnet#3079), at the command line and in Python."""
    mask = _in(files, "mask.png")
    painted = Image.merge("RGBA", [Image.new("L", mask.size, 255)] * 3 + [mask])
    painted.save(tmp_path / "painted.png")
    plain = run(model, files, tmp_path / "plain", "inpaint", "@in.png", "@mask.png", "a cat")["0000"]
    ours = run(model, files, tmp_path / "ours", "inpaint", "@in.png", str(tmp_path / "painted.png"), "a cat")["0000"]
    assert np.array_equal(np.asarray(ours), np.asarray(plain))
    assert "drawn anew" not in capsys.readouterr().err
    Image.new("L", mask.size, 0).save(tmp_path / "black.png")
    none = run(model, files, tmp_path / "none", "inpaint", "@in.png", str(tmp_path / "black.png"), "a cat")["0000"]
    assert np.array_equal(np.asarray(none), np.asarray(_in(files)))
    assert "black.png: nothing in it is white" in capsys.readouterr().err
    call = lambda mask: editing.inpaint(TextToImage.load(model), _in(files), mask, "a cat", settings=SETTINGS)[0]  # noqa: E731
    assert np.array_equal(np.asarray(call(painted)), np.asarray(call(mask)))


def test_pictures_given_in_python_are_seen_as_viewers_show_them(pipe: TextToImage, files: Path) -> None:
    """Hidden colours under transparency, EXIF's rotation: the latents are those of what is seen, upright on white."""
    clear = Image.merge("RGBA", [*_in(files).split(), Image.new("L", _in(files).size, 0)])
    white = Image.new("RGB", clear.size, (255, 255, 255))
    assert torch.equal(editing.encode(pipe, clear), editing.encode(pipe, white))
    lying = _in(files)
    lying.getexif()[0x0112] = 6
    upright = _in(files).transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(editing.encode(pipe, lying), editing.encode(pipe, upright))
