"""`ldm edit`: each verb writes what the Python call gives; mistakes end in one line. And the example of all methods."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import shlex
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
from ldm.models.presets import AUTOENCODERS, TEXTS, UNETS
from ldm.models.text import TextTower
from ldm.models.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder
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
        network=unet,
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


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 37 x 29 pixels and a mask of its middle, painted on nothing."""
    folder = tmp_path_factory.mktemp("odd")
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (29, 37, 3), dtype=np.uint8)).save(folder / "in.png")
    mask = np.full((29, 37, 4), 255, np.uint8)
    mask[..., 3] = 0
    mask[9:20, 11:30, 3] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def test_a_picture_keeps_its_own_size(model: Path, odd: Path, tmp_path: Path) -> None:
    """No side is a multiple of 8; what the mask does not paint is the picture, pixel for pixel."""
    before, inside = np.asarray(Image.open(odd / "in.png")), np.asarray(Image.open(odd / "mask.png"))[..., 3] > 0
    for picture in run(model, odd, tmp_path / "a", "inpaint", "@in.png", "@mask.png", "a cat", "--count", "2").values():
        assert picture.size == (37, 29)
        assert np.array_equal(np.asarray(picture)[~inside], before[~inside])
        assert (np.asarray(picture)[inside] != before[inside]).mean() > 0.5
    for verb in (("img2img", "@in.png", "a cat"), ("invert", "@in.png", "--target", "a cat"), ("invert", "@in.png")):
        (picture,) = run(model, odd, tmp_path / f"{verb[0]}{len(verb)}", *verb).values()
        assert picture.size == (37, 29)
    (picture,) = run(model, odd, tmp_path / "b", "inpaint", "@in.png", "@mask.png", "x", "--size", "24", "40").values()
    assert picture.size == (40, 24)
    smaller = np.asarray(Image.open(odd / "in.png").resize((40, 24), Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(picture)[0], smaller[0])
    for verb in (("maps", "a cat"), ("prompt", "a cat", "a dog", "--local", "cat", "dog")):
        found = run(model, odd, tmp_path / verb[0], *verb, "--size", "24", "40")
        assert {picture.size for picture in found.values()} == {(40, 24)}


def test_a_second_edit_into_a_folder_overwrites_nothing(model: Path, odd: Path, tmp_path: Path) -> None:
    run(model, odd, tmp_path, "img2img", "@in.png", "a cat", "--count", "2")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    run(model, odd, tmp_path, "img2img", "@in.png", "a dog", "--strength", "0.5")
    run(model, odd, tmp_path, "invert", "@in.png")
    found = run(model, odd, tmp_path, "invert", "@in.png")
    assert set(found) == {"0000", "0001", "0002", "redrawn", "redrawn-1"}
    assert all(path.read_bytes() == data for path, data in before.items())


def test_pictures_say_the_command_that_drew_them(model: Path, odd: Path, tmp_path: Path, capsys: Any) -> None:
    image = str(odd / "in.png")
    argv = ["img2img", image, "a cat", "--strength", "0.5", "--steps", "2", "--model", str(model), "--seed", "-7"]
    assert main(["edit", *argv, "--out", str(tmp_path / "a")]) == 0
    told = json.loads(Image.open(tmp_path / "a" / "0000.png").text["ldm"])  # type: ignore[attr-defined]
    assert told["command"] == ["edit", *argv, "--out", str(tmp_path / "a")]
    assert told["inputs"] == {"image": hashlib.sha256((odd / "in.png").read_bytes()).hexdigest()}
    capsys.readouterr()
    assert main(["sample", "--from-png", str(tmp_path / "a" / "0000.png")]) == 2
    line = capsys.readouterr().err.split("this draws it again: ")[1]
    assert main([*shlex.split(line)[1:-1], str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / "0000.png").exists()
    first, again = (np.asarray(Image.open(tmp_path / name / "0000.png")) for name in "ab")
    assert np.array_equal(first, again)


def test_many_are_drawn_in_batches(model: Path, odd: Path, tmp_path: Path) -> None:
    """The same pictures, whatever the batch size, to rounding."""
    verb = ("inpaint", "@in.png", "@mask.png", "a cat", "--count", "3")
    found = [run(model, odd, tmp_path / b, *verb, "--batch", b) for b in ("1", "2", "16")]
    for name, picture in found[2].items():
        for other in found[:2]:
            assert np.abs(np.asarray(other[name], int) - np.asarray(picture, int)).max() <= 1


def test_what_may_surprise_is_said(model: Path, odd: Path, tmp_path: Path, capsys: Any) -> None:
    argv = ["img2img", str(odd / "in.png"), "a (red:1.2) cat", "--size", "160", "--guidance", "0", "--steps", "2"]
    assert main(["edit", *argv, "--model", str(model), "--out", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert err.count("size 160 x 160 is far from the model's own") == 1
    assert err.count("guidance 0 ignores the prompt") == 1
    assert err.count("'(red:1.2)' is read as words") == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("img2img", "@in.png", "a cat", "--count", "0"), "--count: must be at least 1, got 0"),
        (("img2img", "@in.png", "a cat", "--batch", "0"), "batch must be at least 1, got 0"),
        (("img2img", "@in.png", "a cat", "--size", "20"), "size: 20 is not a multiple of 8 pixels; the nearest are 16"),
        (("img2img", "@in.png", "a cat", "--strength", "1.5"), "strength must lie strictly between 0"),
        (("img2img", "@in.png", "a cat", "--strength", "-0.5"), "strength must lie strictly between 0"),
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


@pytest.mark.parametrize(
    ("verb", "channels"), [("instruct", {"in_channels": 8}), ("upscale", {"in_channels": 7, "num_class_embeds": 1000})]
)
def test_models_that_are_told_a_picture(
    verb: str, channels: dict[str, int], pipe: TextToImage, files: Path, tmp_path: Path, capsys: Any
) -> None:
    """The verb writes what the call gives; other models and values that cannot be end in one line."""
    torch.manual_seed(2)
    unet = UNet(dataclasses.replace(UNETS["tiny"], **channels))
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
    parts: dict[str, Any] = {"autoencoder": pipe.codec.autoencoder, "text": pipe.text}
    save_diffusers(tmp_path / "model", network=unet, scheduler=scheduler_to_diffusers(Discrete(), V()), **parts)
    mine = TextToImage.load(tmp_path / "model")
    if verb == "instruct":
        argv, odd = ["instruct", "@in.png", "make it night", "--image-guidance", "2"], ["--image-guidance", "-1"]
        told = dataclasses.replace(SETTINGS, image_guidance=2.0)
        wanted = editing.instruct(mine, _in(files), "make it night", settings=told)[0]
    else:
        argv, odd = ["upscale", "@small.png", "--prompt", "a cat", "--noise-level", "50"], ["--noise-level", "350"]
        wanted = editing.upscale(mine, _in(files, "small.png"), "a cat", level=50, settings=SETTINGS)[0]
        assert wanted.size == (16, 16)
    found = run(tmp_path / "model", files, tmp_path / "out", *argv)
    assert np.array_equal(np.asarray(found["0000"]), np.asarray(wanted))
    capsys.readouterr()
    words = [str(files / a[1:]) if a.startswith("@") else a for a in argv]
    save_diffusers(tmp_path / "plain", network=pipe.network, scheduler=scheduler_to_diffusers(Discrete(), V()), **parts)
    for model, more in ((tmp_path / "plain", []), (tmp_path / "model", odd)):
        assert main(["edit", *words, *more, "--steps", "1", "--model", str(model), "--out", str(tmp_path / "no")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_loras_and_controlnets_work_beside(model: Path, files: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The call's own result under both, other than without them; a ControlNet's options are checked before."""
    from ldm.adapters.low_rank import LowRank
    from ldm.checkpoint.control_files import save_control
    from ldm.checkpoint.lora_files import write_lora
    from ldm.models.unet.controlnet import ControlNet
    from ldm.pipeline import Control

    own = TextToImage.load(model)
    net = ControlNet.copy_of(own.network, own.codec.factor)
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_control(tmp_path / "control", net.config, net.state_dict())
    name = next(n for n, _ in own.network.named_modules() if n.endswith("attn1.to_q"))
    width = own.network.get_submodule(name).weight.shape[1]
    low = LowRank(torch.randn(2, width), torch.randn(width, 2), 2.0)
    write_lora(tmp_path / "style.safetensors", {f"unet.{name}": low}, own.network.config)
    given = ("img2img", "@in.png", "a cat", "--strength", "0.5")
    control = ("--control", f"{tmp_path / 'control'}:{files / 'in.png'}:0.5")
    lora = ("--lora", f"{tmp_path / 'style.safetensors'}:0.7")
    plain, both = (run(model, files, tmp_path / f"out{len(m)}", *given, *m)["0000"] for m in ((), (*control, *lora)))
    own.load_lora(tmp_path / "style.safetensors", 0.7)
    under = own.controlled([Control(network=net, picture=_in(files), scale=0.5)])
    wanted = editing.img2img(under, _in(files), "a cat", strength=0.5, settings=SETTINGS)[0]
    assert np.array_equal(np.asarray(both), np.asarray(wanted))
    assert not np.array_equal(np.asarray(both), np.asarray(plain))
    record = json.loads(both.info["ldm"]) if "ldm" in both.info else both.info
    assert "conditions" in str(record)
    with pytest.raises(SystemExit):
        main(["edit", "maps", "a cat", "--control", "x:y"])
