"""`ldm evaluate samplers` on tiny random models: figures of the single commands, resuming, what may be mixed."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.folders import write_module
from ldm.checkpoint.schedulers import scheduler_to_diffusers
from ldm.cli import evaluate, evaluate_samplers
from ldm.cli.evaluate_samplers import entry
from ldm.config.load import encode
from ldm.diffusion import Discrete, V
from ldm.evaluate import measure, sampler_measure, sampler_rows
from ldm.metrics import features
from ldm.models.presets import AUTOENCODERS, CLIPS, TEXTS, UNETS
from ldm.models.text import TextTower, build_clip
from ldm.models.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder
from ldm.pipeline import TextToImage
from ldm.sampling import sample
from ldm.web.chart import Curve
from ldm.web.figure import Panel, svg


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two diffusers folders of tiny random networks, and a CLIP."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        unet = UNet(UNETS["tiny"])
        torch.nn.init.normal_(unet.conv_out.weight, std=0.05)
        save_diffusers(
            root / name,
            network=unet,
            autoencoder=Autoencoder(AUTOENCODERS["tiny"]),
            text=[TextTower(TEXTS["tiny"][0])],
            scheduler=scheduler_to_diffusers(Discrete(zero_terminal_snr=True), V()),
        )
    weights = build_clip(CLIPS["tiny"]).state_dict()
    write_module(root / "clip" / "export" / "clip", weights, {"_class_name": "CLIP", **encode(CLIPS["tiny"])})
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> features.Encoder:
    """Features that cost nothing."""
    network = features.Encoder("pixels@2", lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))
    monkeypatch.setattr(features, "load_network", lambda name, weights=None: network)
    return network


def command(models: Path, out: Path, *extra: Any) -> list[dict[str, Any]]:
    argv = ["samplers", "--clip", models / "clip", "--count", "6,3:4", "--reference", 20, "--candidates", 8]
    argv += ["--model", models / "teacher", "--splits", "heldout", "--out", out, *extra]
    assert evaluate.main([str(a) for a in argv]) == 0
    return json.loads((out / "results.json").read_text())


def find(rows: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    (row,) = [r for r in rows if all(r["protocol"][k] == v for k, v in values.items())]
    return row


def test_rows_are_what_the_single_commands_measure(models: Path, tmp_path: Path, small: features.Encoder) -> None:
    rows = command(models, tmp_path / "table", "--samplers", "ddim,dpmpp_2m", "--steps", "1,3", "--guidance", 2)
    assert len(rows) == 2 + 4
    row = find(rows, sampler="dpmpp_2m", steps=1)
    argv = ["retrieval", "--model", models / "teacher", "--clip", models / "clip", "--split", "heldout", "--count", 6]
    argv += ["--candidates", 8, "--steps", 1, "--guidance", 2, "--out", tmp_path / "one.json"]
    assert evaluate.main([str(a) for a in argv]) == 0
    alone = json.loads((tmp_path / "one.json").read_text())
    for k in ("R@1", "R@5"):
        assert row["result"][k] == alone["result"][k]
    assert row["protocol"]["weights"] == alone["protocol"]["weights"]
    said = {"count": 6, "seed": 0, "sampler": "dpmpp_2m", "steps": 1, "guidance": 2.0, "network": "pixels@2"}
    assert said.items() <= row["protocol"].items()
    assert find(rows, sampler="ddim", steps=3)["protocol"]["count"] == 4, "from 3 steps on fewer pictures"
    # the kernel distance of the autoencoder's pictures, from the definition
    drawn = measure.draw("emoji", "heldout", 129)
    pipe = TextToImage.load(models / "teacher")
    size = 8 * pipe.codec.factor
    with torch.no_grad():
        own = pipe.codec.decode(pipe.codec.encode(measure.real_pictures("emoji", "heldout", drawn.ids[:6], size)))
    real = small(measure.real_pictures("emoji", "heldout", drawn.ids[:-21:-1], size)).double()
    expected = sampler_measure.fid.kernel_distance(real, small(own.clamp(-1, 1)).double(), subsets=20, size=3)
    found = find(rows, sampler="autoencoder")["result"]["kernel_distance"]
    assert found["mean"] == pytest.approx(expected.mean, rel=1e-4)
    assert find(rows, sampler="real")["protocol"]["shared"] == 0


def test_calls_of_the_network_are_counted(models: Path, tmp_path: Path) -> None:
    rows = command(models, tmp_path, "--samplers", "ddim,heun", "--steps", 3, "--guidance", "1,2", "--no-bounds")
    counted = {(r["protocol"]["sampler"], r["protocol"]["guidance"]): r["result"] for r in rows}
    for (sampler, guidance), result in counted.items():
        calls = 3 if sampler == "ddim" else 4  # out of pure noise and into the data there is no second call
        assert result["network_rows_per_picture"] == calls * guidance
        assert all(result[f"{name}_seconds_per_picture"] > 0 for name in ("loop", "text", "decode"))


def test_the_time_of_a_picture_is_that_of_the_sampling_loop(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """By a clock that each part of the work moves on: only the network's calls are in the loop's time."""
    clock = [0.0]

    def takes(owner: Any, name: str, seconds: float) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **rest: Any) -> Any:
            clock[0] += seconds
            return original(*args, **rest)

        monkeypatch.setattr(owner, name, call)

    takes(TextToImage, "_cond", 1.0)
    takes(TextToImage, "_net", 10.0)
    takes(TextToImage, "decode", 100.0)
    takes(sampler_measure.Judge, "describe", 1000.0)
    monkeypatch.setattr(sampler_measure.time, "perf_counter", lambda: clock[0])
    rows = command(models, tmp_path, "--samplers", "ddim", "--steps", 3, "--guidance", 2, "--no-bounds")
    result = rows[0]["result"]
    assert result["loop_seconds_per_picture"] == 3 * 10 / 4
    assert result["text_seconds_per_picture"] == 2 * 1 / 4, "the negative prompt's, and the prompts'"
    assert result["decode_seconds_per_picture"] == 100 / 4
    assert "sampling loop" in (tmp_path / "table.md").read_text()


def test_a_second_run_measures_only_what_is_missing(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    options = ("--samplers", "ddim", "--steps", "1,2", "--no-bounds")
    before = command(models, tmp_path, *options)
    drawn: list[tuple[int, int]] = []
    original = TextToImage.latents

    def latents(self: TextToImage, prompts: Any, settings: Any, *rest: Any, **more: Any) -> torch.Tensor:
        drawn.append((settings.steps, len(prompts)))
        return original(self, prompts, settings, *rest, **more)

    monkeypatch.setattr(TextToImage, "latents", latents)
    assert command(models, tmp_path, *options) == before
    assert drawn == [(1, 1)], "nothing but the picture that warms up"
    (tmp_path / "rows" / "teacher-ddim-0002-g3-heldout.json").unlink()
    again = command(models, tmp_path, *options)
    assert drawn[1:] == [(1, 1), (2, 6)]
    for a, b in zip(before, again):
        assert a["protocol"] == b["protocol"]
        assert a["result"]["kernel_distance"] == b["result"]["kernel_distance"]
    more = command(models, tmp_path, *options, "--model", f"four={models / 'student'}:lcm:steps=4:guidance=1")
    assert len(more) == 3
    row = find(more, model="four")["protocol"]
    assert (row["sampler"], row["steps"], row["guidance"], row["count"]) == ("lcm", 4, 1.0, 4)
    assert row["weights"]["unet"] != find(more, model="teacher", steps=1)["protocol"]["weights"]["unet"]
    page = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")]
    assert len(page) == 2 + 3
    assert all(line.count("|") == page[0].count("|") for line in page)
    texts = {e.text for e in xml.parse(tmp_path / "figure.svg").iter() if e.tag.endswith("text")}
    assert {"four lcm", "teacher ddim", "heldout: KID · 10³", "heldout: R@1", "steps"} <= texts


def test_a_row_that_was_stopped_goes_on_with_the_batches_that_are_missing(
    models: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    options = ("--samplers", "ddim", "--steps", "2", "--no-bounds", "--batch", 2)
    whole = command(models, tmp_path / "whole", *options)
    original, calls = TextToImage.decode, [0]

    def decode(self: TextToImage, latents: Any, settings: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 4:  # the first is the picture that warms up
            raise KeyboardInterrupt
        return original(self, latents, settings)

    monkeypatch.setattr(TextToImage, "decode", decode)
    with pytest.raises(KeyboardInterrupt):
        command(models, tmp_path / "stopped", *options)
    assert len(list((tmp_path / "stopped" / "parts").iterdir())) == 2
    resumed = command(models, tmp_path / "stopped", *options)
    assert calls[0] == 4 + 1 + 1, "one to warm up, and the third batch"
    assert resumed[0]["result"]["kernel_distance"] == whole[0]["result"]["kernel_distance"]
    assert not (tmp_path / "stopped" / "parts").exists()


def test_rows_measured_otherwise_are_not_mixed_in(models: Path, tmp_path: Path) -> None:
    options = ("--samplers", "ddim", "--steps", "1", "--no-bounds")
    command(models, tmp_path, *options)
    with pytest.raises(ValueError, match="candidates 8, now 16"):
        command(models, tmp_path, *options, "--candidates", 16)
    with pytest.raises(ValueError, match="count 6, now 5"):
        command(models, tmp_path, *options, "--count", 5)


def test_clip_guidance_is_a_row_of_its_own(models: Path, tmp_path: Path) -> None:
    rows = command(models, tmp_path, "--samplers", "ddim", "--steps", 2, "--clip-guidance", "0,50", "--no-bounds")
    plain, guided = (find(rows, clip_guidance=v)["result"] for v in (0, 50))
    assert plain["kernel_distance"] != guided["kernel_distance"]
    assert "CLIP guidance" in (tmp_path / "table.md").read_text()


def test_small_splits_come_round_with_other_noise() -> None:
    truth = sampler_measure.Truth(("a", "b", "c"), (7, 8, 9), (), torch.zeros(1, 1), ())
    assert truth.of(5) == (["a", "b", "c", "a", "b"], [7, 8, 9, 7, 8])


def test_entries() -> None:
    assert entry("emoji") == sampler_rows.Entry(name="emoji", source="emoji")
    full = entry("four=runs/x/export:lcm,tcd:steps=1,4:guidance=1:spacing=lcm")
    assert full == sampler_rows.Entry(
        name="four", source="runs/x/export", samplers=("lcm", "tcd"), steps=(1, 4), guidance=(1.0,), spacing="lcm"
    )


def test_every_sampler_takes_every_number_of_steps_of_the_table() -> None:
    """From 1 to all 1,000 times: x_0 known exactly, each ends in the data; rows of many steps have fewer pictures."""
    counts = ((0, 1000), (250, 128), (1000, 32))
    assert evaluate_samplers._counts("1000,250:128,1000:32") == counts
    steps, samplers = (1, 2, 4, 8, 16, 25, 50, 250, 1000), ("ddpm", "ddim", "dpmpp_2m", "unipc")
    plan = sampler_rows.Plan(models=(entry("emoji"),), samplers=samplers, steps=steps, counts=counts)
    cases = [case for case in plan.cases() if case.sampler not in sampler_rows.BOUNDS]
    assert len(cases) == 2 * len(samplers) * len(steps)
    assert {case.split for case in cases} == {"train", "compositional"}
    assert {case.steps: case.count for case in cases} == dict.fromkeys(steps[:-2], 1000) | {250: 128, 1000: 32}
    schedule, goal = Discrete(betas="scaled_linear", zero_terminal_snr=True), torch.full((1, 1, 2, 2), 0.3)
    for case in cases[: len(cases) // 2]:
        drawn = sample(
            case.sampler, lambda x, t, cond: goal, torch.ones(1, 1, 2, 2), {}, schedule=schedule, steps=case.steps,
            noise=lambda i: torch.zeros(1, 1, 2, 2),
        )  # fmt: skip
        assert torch.allclose(drawn, goal, atol=0.05), case


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--samplers", "dim"), "'dim' is not one of"),
        (("--steps", "1,x"), "--steps: 'x' is not a number"),
        (("--steps", "0"), "steps must be at least 1"),
        (("--count", "1"), "counts at least 2"),
        (("--count", "5:10"), "must rise from 0"),
        (("--model", "a=b:colour=red"), "'colour'"),
        (("--model", "a=b", "--model", "a=c"), "names must differ"),
        (("--splits", ","), "--splits"),
    ],
)
def test_mistakes_name_the_value(argv: tuple[str, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        evaluate.main(["samplers", "--out", str(tmp_path), *argv])


def test_the_figure_puts_points_where_they_belong() -> None:
    """Even ratios are even distances on logarithmic axes; a point that has no logarithm is left out."""
    curve = Curve("a & b", [1, 10, 100, 1000], [1.0, 0.1, 0.01, -1.0])
    drawn = svg([Panel("title", [curve], "steps", log_x=True, log_y=True)])
    root = xml.fromstring(drawn)
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    (x0, y0), (x1, y1), (x2, y2) = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in circles]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert y1 > y0, "down is larger in a drawing"
    assert re.search(r"a &amp; b", drawn)
    texts = {e.text for e in root.iter() if e.tag.endswith("text")}
    assert {"0.01", "0.1", "1", "10", "100"} <= texts, "round ticks"
    _, _, wide, high = map(float, root.attrib["viewBox"].split())
    assert all(0 < float(c.attrib["cx"]) < wide and 0 < float(c.attrib["cy"]) < high for c in circles)
    with pytest.raises(ValueError, match="no finite point"):
        svg([Panel("title", [Curve("a", [1], [float("nan")])], "x")])
