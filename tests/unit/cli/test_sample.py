"""`ldm sample` of many pictures: written as they are drawn, never over others, and drawn again from what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.schedulers import scheduler_to_diffusers
from ldm.cli import drawn
from ldm.cli.__main__ import main
from ldm.cli.adapting import lora_of
from ldm.cli.sample import _prompts_in
from ldm.diffusion import Discrete, V
from ldm.models.presets import AUTOENCODERS, TEXTS, UNETS
from ldm.models.text import TextTower
from ldm.models.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder
from ldm.pipeline import TextToImage


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(2)
    unet = UNet(UNETS["tiny"])
    torch.nn.init.normal_(unet.conv_out.weight, std=0.2)
    parts: dict[str, Any] = {"network": unet, "autoencoder": Autoencoder(AUTOENCODERS["tiny"])}
    folder, scheduler = tmp_path_factory.mktemp("model"), scheduler_to_diffusers(Discrete(), V())
    save_diffusers(folder, **parts, text=[TextTower(TEXTS["tiny"][0])], scheduler=scheduler)
    return folder


def sample(*argv: object) -> int:
    return main(["sample", *map(str, argv)])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def told(path: Path) -> dict[str, Any]:
    return json.loads(Image.open(path).text["ldm"])  # type: ignore[attr-defined]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


HOW = (
    "--sampler", "euler_ancestral", "--steps", 3, "--guidance", 2, "--seed", 2**70, "--negative", "a (dull:1.2) day",
    "--eta", 0.5, "--prompt-weights", "--size", 24, 40,
)  # fmt: skip


@pytest.fixture(scope="module")
def many(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "out"
    assert sample("a (red:1.4) cat", "a dog", *HOW, "--count", 3, "--batch", 4, "--model", model, "--out", folder) == 0
    return folder


def test_a_second_call_goes_on_numbering_and_says_it(model: Path, many: Path, tmp_path: Path, capsys: Any) -> None:
    first = [*(f"000{i}-a-red-1-4-cat.png" for i in range(3)), *(f"000{i}-a-dog.png" for i in range(3, 6)), "grid.png"]
    assert names(many) == first
    out = tmp_path / "out"
    here = ("--model", model, "--steps", 1, "--out", out)
    assert sample("a cat", *here) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert sample("a cat", "a dog", "--seed", 5, *here) == 0
    assert "holds pictures already: numbers go on at 0001" in capsys.readouterr().err
    assert all(path.read_bytes() == data for path, data in before.items())
    later = ["0001-a-cat.png", "0002-a-dog.png", "grid-0001.png"]
    assert names(out) == sorted(["0000-a-cat.png", "grid.png", *later])


@pytest.mark.parametrize("index", [0, 2, 5])
def test_one_of_many_is_drawn_again_by_its_index_to_the_last_bit(
    model: Path, many: Path, tmp_path: Path, index: int
) -> None:
    here = ("--count", 3, "--batch", 4, "--model", model, "--out", tmp_path)
    assert sample("a (red:1.4) cat", "a dog", *HOW, *here, "--index", index) == 0
    (path,) = tmp_path.iterdir()
    assert np.array_equal(pixels(path), pixels(sorted(many.iterdir())[index]))
    assert told(path)["index"] == index


def test_a_picture_is_drawn_again_from_itself_to_the_last_bit(model: Path, many: Path, tmp_path: Path) -> None:
    """Every setting is read back; the grid stands for the whole call."""
    for k, path in enumerate(sorted(many.glob("0*.png"))):
        assert sample("--from-png", path, "--out", tmp_path / str(k)) == 0
        (again,) = (tmp_path / str(k)).iterdir()
        assert np.array_equal(pixels(again), pixels(path))
        assert again.name[4:] == path.name[4:]
        assert told(again) == told(path) | {"count": 1}
    assert sample("--from-png", many / "grid.png", "--out", tmp_path / "all") == 0
    assert names(tmp_path / "all") == names(many)
    for name in names(many):
        assert np.array_equal(pixels(tmp_path / "all" / name), pixels(many / name)), name
    one = sorted(many.glob("0*.png"))[4]
    assert sample("--from-png", one, "--seed", 1, "--out", tmp_path / "other") == 0
    (other,) = (tmp_path / "other").iterdir()
    assert told(other) == told(one) | {"seed": 1, "count": 1}
    assert not np.array_equal(pixels(other), pixels(one))


def test_another_model_than_the_pictures_own_is_said(model: Path, many: Path, tmp_path: Path, capsys: Any) -> None:
    pipe, other = TextToImage.load(model), tmp_path / "other"
    with torch.no_grad():
        pipe.unet.conv_out.weight *= 1.01
    parts: dict[str, Any] = {"network": pipe.unet, "autoencoder": pipe.codec.autoencoder, "text": pipe.text}
    save_diffusers(other, **parts, scheduler=scheduler_to_diffusers(Discrete(), V()))
    one = next(iter(many.glob("0000*")))
    assert sample("--from-png", one, "--model", other, "--out", tmp_path / "a") == 0
    assert "drawn by a model of other weights" in capsys.readouterr().err
    assert sample("--from-png", one, "--out", tmp_path / "b") == 0
    assert "other weights" not in capsys.readouterr().err
    assert sample("--from-png", one, "--precision", "bf16", "--out", tmp_path / "c") == 0
    said = capsys.readouterr().err
    assert "drawn with precision fp32, now bf16: the picture will be another" in said
    assert "other weights" not in said


def test_what_is_interrupted_keeps_what_it_had(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Each batch is on the disk before the next one begins."""
    own, calls = TextToImage.latents, []

    def latents(self: TextToImage, *args: Any, **how: Any) -> Any:
        calls.append(sorted(path.name for path in tmp_path.glob("out/*")))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(self, *args, **how)

    monkeypatch.setattr(TextToImage, "latents", latents)
    argv = ("a cat", "--count", 7, "--batch", 2, "--steps", 1, "--model", model, "--out", tmp_path / "out")
    assert sample(*argv) == 130
    assert [len(found) for found in calls] == [0, 2, 4]
    assert names(tmp_path / "out") == [*(f"000{i}-a-cat.png" for i in range(4)), "grid.png"]
    assert "interrupted: 4 of 7 pictures are in" in capsys.readouterr().err


def test_a_grid_of_very_many_says_what_it_leaves_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(drawn, "GRID_PIXELS", 2 * 8 * 8)
    assert sample("a cat", "--count", 3, "--size", 8, "--steps", 1, "--model", model, "--out", tmp_path) == 0
    assert "grid.png shows 2 of 3 pictures" in capsys.readouterr().err
    assert Image.open(tmp_path / "grid.png").size == (18, 8)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--index", "7"), "--index: 7 is none of the 1 pictures, 0 to 0; give the prompts and the --count"),
        (("--index", "-1"), "--index: -1 is none of the 1 pictures"),
        (("--count", "0"), "--count: must be at least 1, got 0"),
        (("--batch", "0"), "batch must be at least 1, got 0"),
        (("--steps", "0"), "steps must be at least 1, got 0"),
        (("--size", "20"), "size: 20 is not a multiple of 8 pixels; the nearest are 16 and 24"),
        (("--size", "8", "8", "8"), "--size: expected one or two numbers, got [8, 8, 8]"),
    ],
)
def test_mistakes_end_in_one_line(argv: tuple[str, ...], says: str, model: Path, tmp_path: Path, capsys: Any) -> None:
    assert sample("a cat", *argv, "--model", model, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_said_before_anything_is_drawn(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(TextToImage, "latents", lambda *_, **__: pytest.fail("drawn"))
    (tmp_path / "out").write_text("mine")
    assert sample("a cat", "--model", model, "--out", tmp_path / "out") == 2
    assert "a file; expected a folder for the pictures" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_what_may_surprise_is_said_before_it_is_drawn(model: Path, tmp_path: Path, capsys: Any) -> None:
    here = ("--steps", 1, "--model", model, "--out", tmp_path)
    assert sample("a (red:1.2) cat", "a (red:1.2) cat", "--guidance", 0, "--size", 160, *here) == 0
    err = capsys.readouterr().err
    assert err.count("guidance 0 ignores the prompt") == 1
    assert err.count("size 160 x 160 is far from the model's own") == 1
    assert err.count("'(red:1.2)' is read as words") == 1


LINES = ["a red apple", "cat face", "é, ü"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompt_files_of_any_encoding_and_line_end(encoding: str, end: str, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(end.join(["# mine", LINES[0], "", "  " + LINES[1], LINES[2] + "\u2028", ""]).encode(encoding))
    assert _prompts_in(path) == LINES
    assert "1 lines that begin with # are left out" in capsys.readouterr().err


def test_a_prompt_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt.*save it as UTF-8"):
        _prompts_in(path)
    path.write_text("a cat --n dull --d 5")
    assert _prompts_in(path) == ["a cat --n dull --d 5"]
    assert "'--n dull' is read as words" in capsys.readouterr().err


def test_lora_paths_with_colons_and_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my style.safetensors", "a:b.safetensors", "a:0.5"):
        Path(name).touch()
    assert lora_of("my style.safetensors") == ("my style.safetensors", 1.0)
    assert lora_of("my style.safetensors:-0.5") == ("my style.safetensors", -0.5)
    assert lora_of("a:b.safetensors") == ("a:b.safetensors", 1.0)
    assert lora_of("a:b.safetensors:2") == ("a:b.safetensors", 2.0)
    assert lora_of("a:0.5") == ("a:0.5", 1.0)
    assert lora_of("no:such.safetensors") == ("no:such.safetensors", 1.0)
    for entry in ("my style.safetensors:much", "my style.safetensors:nan"):
        with pytest.raises(ValueError, match="expected PATH or PATH:WEIGHT"):
            lora_of(entry)


A1111 = """a (red:1.2) cat,
in the sun
Negative prompt: dull, grey
Steps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4.5, Seed: 18446744073709551611, Size: 40x24, \
Model hash: 0123456789, Model: "my, model", Clip skip: 2, Version: v1.10.1"""
GRAPH: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 5, "steps": 3, "cfg": 4.5, "sampler_name": "euler", "scheduler": "karras", "denoise": 1,
            "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 40, "height": 24, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (red:1.2) cat", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "dull", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "images": ["8", 0]}},
}  # fmt: skip


@pytest.fixture
def png(tmp_path: Path) -> Any:
    def write(**texts: str) -> Path:
        info = PngInfo()
        for key, text in texts.items():
            info.add_text(key, text)
        Image.new("RGB", (8, 8)).save(tmp_path / "theirs.png", pnginfo=info)
        return tmp_path / "theirs.png"

    return write


def test_pictures_of_a1111_are_read(png: Any, model: Path, tmp_path: Path, capsys: Any) -> None:
    path = png(parameters=A1111)
    assert sample("--from-png", path, "--out", tmp_path / "out") == 2
    assert "say with --model where its model 'my, model' is" in capsys.readouterr().err
    assert sample("--from-png", path, "--model", model, "--out", tmp_path / "out") == 0
    err = capsys.readouterr().err
    assert "settings of A1111; the noise is not its own" in err
    assert "not used: Clip skip: 2" in err
    assert "Version" not in err
    found = told(next((tmp_path / "out").glob("0000*")))
    expected = {
        "prompt": "a (red:1.2) cat, in the sun", "negative": "dull, grey", "steps": 3, "sampler": "dpmpp_2m",
        "spacing": "karras", "guidance": 4.5, "seed": 2**64 - 5, "size": [24, 40], "prompt_weights": True,
    }  # fmt: skip
    assert {k: found[k] for k in expected} == expected


def test_pictures_of_comfyui_are_read(png: Any, model: Path, tmp_path: Path, capsys: Any) -> None:
    path = png(prompt=json.dumps(GRAPH), workflow="{}")
    assert sample("--from-png", path, "--model", model, "--steps", 2, "--out", tmp_path / "out") == 0
    assert "settings of ComfyUI" in capsys.readouterr().err
    found = told(next((tmp_path / "out").glob("0000*")))
    expected = {
        "prompt": "a (red:1.2) cat", "negative": "dull", "steps": 2, "sampler": "euler", "spacing": "karras",
        "guidance": 4.5, "seed": 5, "size": [24, 40], "prompt_weights": True,
    }  # fmt: skip
    assert {k: found[k] for k in expected} == expected


def _changed(node: str, **inputs: Any) -> str:
    return json.dumps({**GRAPH, node: {**GRAPH[node], "inputs": GRAPH[node]["inputs"] | inputs}})


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ({}, "it has no settings in it"),
        ({"Title": "x"}, "it has no settings, only the texts ['Title']"),
        ({"invokeai_metadata": "{}"}, "its settings are of InvokeAI"),
        ({"parameters": '{"sui_image_params": {}}'}, "JSON under 'parameters'"),
        ({"parameters": "a cat"}, "do not end with a line of settings"),
        ({"parameters": A1111.replace("DPM++ 2M", "DPM fast")}, "Sampler 'DPM fast' is none that is known here"),
        ({"parameters": A1111.replace("Karras", "Beta")}, "Schedule type 'Beta' is none that is known here"),
        ({"parameters": A1111 + ", Denoising strength: 0.5"}, "drawn from another picture (Denoising strength: 0.5)"),
        ({"parameters": A1111.replace("Seed: 1", "Seed: x")}, "Seed: expected a number"),
        ({"prompt": _changed("3", denoise=0.5)}, "begins within a picture (denoise 0.5)"),
        ({"prompt": _changed("3", sampler_name="dpm_adaptive")}, "sampler_name 'dpm_adaptive' is none"),
        ({"prompt": _changed("3", positive=["5", 0])}, "positive comes from EmptyLatentImage"),
        ({"prompt": _changed("6", text=["4", 0])}, "text comes from another node"),
        ({"prompt": json.dumps({**GRAPH, "10": {"class_type": "ImageUpscale", "inputs": {}}})}, "ImageUpscale"),
        ({"prompt": json.dumps({**GRAPH, "10": GRAPH["3"]})}, "2 nodes KSampler, expected one"),
        ({"ldm": "{"}, "its settings are damaged"),
        ({"ldm": '{"prompt": "x", "index": 0, "zoom": 2}'}, "settings that are not known here: zoom"),
        ({"ldm": '{"command": ["edit", "img2img", "my cat.png"]}'}, "ldm edit img2img 'my cat.png'"),
    ],
)
def test_pictures_that_cannot_be_drawn_again_are_refused_by_name(
    texts: dict[str, str], says: str, png: Any, model: Path, tmp_path: Path, capsys: Any
) -> None:
    assert sample("--from-png", png(**texts), "--model", model, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert says in err
    assert "theirs.png" in err
    assert not (tmp_path / "out").exists()


def test_settings_in_a_jpeg_are_read(tmp_path: Path, model: Path) -> None:
    """A1111 writes them as the comment of the picture's EXIF there."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + A1111.encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs.jpg", exif=exif)
    assert drawn.texts(tmp_path / "theirs.jpg")["parameters"] == A1111
    assert sample("--from-png", tmp_path / "theirs.jpg", "--model", model, "--steps", 1, "--out", tmp_path / "o") == 0
