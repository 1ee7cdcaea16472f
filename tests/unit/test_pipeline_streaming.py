"""Pictures of pipelines whose network's blocks come and go: the same bits, in every family and by every way in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import ldm
from ldm.adapters.low_rank import LowRank
from ldm.adapters.sites import all_sites
from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.lora_files import write_lora
from ldm.cli.sample import main as sample
from ldm.editing import Change, attention_maps, edit, img2img, inpaint, invert, redraw
from ldm.models import streaming
from ldm.models.control import attention_layers, controlled
from ldm.pipeline import Settings, TextToImage
from ldm.pipeline.memory import Placement
from tests import families
from tests.counting import Counted
from tests.parity import test_diffusers_folder as unets

torch.set_num_threads(1)
KINDS = ("sd1", "sdxl", "sd3", "flux", "pixart", "zimage")
DRAW = Settings(sampler="euler", steps=20, guidance=3.0, size=(16, 16), seed=4)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """What pipelines stream to."""
    counted = Counted()
    monkeypatch.setattr(streaming, "mover", lambda device: counted)
    return counted


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp(request.param)
    kind = request.param
    parts = unets.make(kind) if kind in ("sd1", "sdxl") else families.make(kind, at / "t5")
    save_diffusers(
        at / "m", network=parts.network, autoencoder=parts.autoencoder, text=parts.text, scheduler=parts.scheduler
    )
    return at / "m"


def draw(pipe: TextToImage, settings: Settings = DRAW) -> Tensor:
    return pipe.sample(["a red apple", "a green one"], settings=settings)


@pytest.fixture(scope="module")
def emoji() -> TextToImage:
    return ldm.load("emoji")


@pytest.fixture
def few(emoji: TextToImage, device: Counted) -> Iterator[TextToImage]:
    """The same weights with two blocks on the device."""
    yield ldm.load("emoji", blocks_on_device=2)
    assert device.most <= 2
    assert device.sizes


def test_twenty_guided_steps_are_the_same(folder: Path, device: Counted) -> None:
    wanted = draw(ldm.load(str(folder)))
    for blocks in (1, 2):
        pipe = ldm.load(str(folder), blocks_on_device=blocks)
        assert torch.equal(draw(pipe), wanted)
        assert device.most <= blocks
        before = len(device.sizes)
        streaming.stop(pipe.network)
        assert device.now == 0
        assert before >= 20
    assert not torch.equal(wanted, torch.zeros_like(wanted))


def test_a_lora_is_merged_into_blocks_wherever_they_are(folder: Path, tmp_path: Path, device: Counted) -> None:
    """Between pictures, with blocks there, away and on their way; taken out again the weights are what they were."""
    device.hidden = False
    pipes = [ldm.load(str(folder)), ldm.load(str(folder), blocks_on_device=2)]
    torch.manual_seed(2)
    lora = {}
    for name, site in all_sites(pipes[0].network, []).items():
        out, *rest = site.read().shape
        down, up = torch.randn(2, *rest) * 0.1, torch.randn(out, 2, *[1] * (len(rest) - 1)) * 0.1
        lora[name] = LowRank(down, up, 2.0)
    write_lora(tmp_path / "x.safetensors", lora, pipes[0].network.config)
    few = Settings(sampler="euler", steps=2, guidance=2.0, size=(16, 16), seed=4)
    before = {name: value.clone() for name, value in pipes[0].network.state_dict().items()}

    def drawn() -> Tensor:
        found = [draw(pipe, few) for pipe in pipes]
        assert torch.equal(*found)
        return found[0]

    plain = drawn()
    for pipe in pipes:
        pipe.load_lora(tmp_path / "x.safetensors", 0.7)
    merged = drawn()
    assert not torch.equal(merged, plain)
    for pipe in pipes:
        pipe.set_loras({"x": 1.3})
    assert not torch.equal(drawn(), merged)
    for pipe in pipes:
        pipe.unload_loras()
    assert torch.equal(drawn(), plain)
    found = pipes[1].network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in before.items())


GUIDED: dict[str, Settings] = {
    "projected": Settings(steps=3, guidance=4.0, guide="projected", size=(32, 32)),
    "perpendicular": Settings(steps=3, guidance=4.0, guide="perpendicular", negative="blue", size=(32, 32)),
    "interval": Settings(steps=4, guidance=4.0, interval=(0.3, 0.7), size=(32, 32)),
    "several calls a step": Settings(sampler="heun", steps=3, guidance=3.0, size=(32, 32)),
    "long prompts": Settings(steps=2, guidance=3.0, long=True, size=(32, 32)),
}


@pytest.mark.parametrize("name", GUIDED)
def test_kinds_of_guidance(name: str, emoji: TextToImage, few: TextToImage) -> None:
    assert torch.equal(draw(few, GUIDED[name]), draw(emoji, GUIDED[name]))


def test_skipped_layers(tmp_path: Path, device: Counted) -> None:
    parts = families.make("sd3", tmp_path / "t5")
    own = {"network": parts.network, "autoencoder": parts.autoencoder, "text": parts.text}
    save_diffusers(tmp_path / "m", scheduler=parts.scheduler, **own)  # type: ignore[arg-type]
    settings = Settings(
        sampler="euler", steps=6, guidance=3.0, size=(16, 16), skip_layers=(1,), skip_interval=(0.2, 0.9)
    )
    wanted = draw(ldm.load(str(tmp_path / "m")), settings)
    assert torch.equal(draw(ldm.load(str(tmp_path / "m"), blocks_on_device=2), settings), wanted)
    assert device.most == 2


def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((64, 64))


def edited(pipe: TextToImage, way: str) -> Any:
    settings = Settings(sampler="ddim", steps=4, guidance=2.0, size=(64, 64), seed=2)
    image = picture()
    mask = Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16))
    ways: dict[str, Callable[[], Any]] = {
        "img2img": lambda: img2img(pipe, image, "a red apple", strength=0.6, settings=settings),
        "inpaint": lambda: inpaint(pipe, image, mask, "a red apple", settings=settings),
        "invert": lambda: redraw(
            pipe, invert(pipe, image, "an apple", settings=settings, refine=1), "an apple", settings=settings
        ),
        "edit": lambda: edit(pipe, "a red apple", "a green apple", settings=settings, change=Change()),
        "maps": lambda: attention_maps(pipe, "a red apple", settings=settings),
    }
    return ways[way]()


def flat(found: Any) -> list[np.ndarray]:
    if isinstance(found, dict):
        return [a for value in found.values() for a in flat(value)]
    return [a for value in found for a in flat(value)] if isinstance(found, (list, tuple)) else [np.asarray(found)]


@pytest.mark.parametrize("way", ["img2img", "inpaint", "invert", "edit", "maps"])
def test_ways_of_editing(way: str, emoji: TextToImage, few: TextToImage) -> None:
    """Hands on attention see the same weights: layers are the same modules, whose weights come and go."""
    for a, b in zip(flat(edited(few, way)), flat(edited(emoji, way)), strict=True):
        assert np.array_equal(a, b)


def test_hands_on_attention(emoji: TextToImage, few: TextToImage) -> None:
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    settings = Settings(steps=2, guidance=1.0, size=(32, 32))
    for i, pipe in enumerate((emoji, few)):
        with controlled(pipe.network, lambda name, weights, i=i: seen[i].append(weights) or weights):
            draw(pipe, settings)
    assert len(seen[0]) == 2 * len(attention_layers(emoji.network))
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_to_ends_it_and_other_networks_are_whole(emoji: TextToImage, few: TextToImage) -> None:
    settings = Settings(steps=2, guidance=2.0, size=(32, 32))
    wanted = draw(emoji, settings)
    other = few.with_network(emoji.network)
    assert other.network.streaming is None
    assert torch.equal(draw(other, settings), wanted)
    draw(few, settings)
    few.stream(3, "cpu")
    assert isinstance(few.network.streaming, streaming.Streaming)
    assert few.network.streaming.count == 3
    assert torch.equal(draw(few, settings), wanted)
    assert few.to("cpu").network.streaming is None
    assert torch.equal(draw(few, settings), wanted)


def test_whole_compiling_is_refused(few: TextToImage) -> None:
    draw(few, Settings(steps=1, guidance=1.0, size=(32, 32)))
    for mode in (None, "default"):
        with pytest.raises(ValueError, match=r"compile: .* compiles the network whole, whose blocks come and go; use"):
            few.compile(mode)
    for count in (0, -3):
        with pytest.raises(ValueError, match=rf"blocks_on_device must be at least 1, or null for all, got {count}"):
            ldm.load("emoji", blocks_on_device=count)


def test_parts_beside_the_network_are_there_only_while_they_are_used() -> None:
    """On a device of no memory: text encoders and autoencoder move, what is streamed does not."""
    pipe = ldm.load("emoji")
    tower, vae = pipe.text[0], pipe.codec.autoencoder
    place = Placement("cpu", torch.float32)
    place.stream(2, "cpu", pipe.network, [tower, vae], offload=True)
    place._device, place._offload = torch.device("cpu"), True
    moved: list[tuple[str, str]] = []

    class Watched(nn.Module):
        def to(self, device: Any) -> Watched:  # type: ignore[override]
            moved.append(("other", str(device)))
            return self

    with place.used(Watched(), pipe.network):
        assert moved == [("other", "cpu")]
    assert len(moved) == 2
    assert pipe.network.streaming is not None


def test_the_command(tmp_path: Path, device: Counted, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["a red apple", "--steps", "2", "--size", "32", "--seed", "1", "--device", "cpu"]
    device.hidden = False
    assert sample([*options, "--out", str(tmp_path / "a")]) == 0
    assert not device.sizes
    assert sample([*options, "--out", str(tmp_path / "b"), "--blocks-on-device", "2"]) == 0
    assert device.sizes
    one, other = (next((tmp_path / name).glob("*.png")).read_bytes() for name in ("a", "b"))
    assert one == other, "the record says nothing of it, as it changes nothing"
    with pytest.raises(ValueError, match="--offload moves the network whole and --blocks-on-device by its blocks"):
        sample([*options, "--out", str(tmp_path / "c"), "--blocks-on-device", "2", "--offload"])
    with pytest.raises(ValueError, match="blocks_on_device must be at least 1, or null for all, got 0"):
        sample([*options, "--out", str(tmp_path / "c"), "--blocks-on-device", "0"])


@pytest.mark.gpu
def test_pictures_on_a_gpu_take_less_memory() -> None:
    settings = Settings(steps=4, guidance=3.0, size=(64, 64))
    for precision in ("fp32", "bf16"):
        peaks, found = [], []
        for blocks in (None, 2):
            torch.cuda.empty_cache()
            pipe = ldm.load("emoji", device="cuda", precision=precision, blocks_on_device=blocks)
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            found.append(draw(pipe, settings))
            peaks.append(held)
            if blocks is not None:
                assert {next(one.parameters()).device.type for one in pipe.text} == {"cpu"}
                assert next(pipe.codec.autoencoder.parameters()).device.type == "cpu"
            del pipe
        assert torch.equal(*found)
        assert peaks[1] < 0.5 * peaks[0]
