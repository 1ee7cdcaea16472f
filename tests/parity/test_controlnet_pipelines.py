"""Under ControlNets our pipeline draws what diffusers' pipelines draw from the same noise, weights and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.models.unet import ControlNet, ControlNetConfig
from ldm.pipeline import Control, Settings, TextToImage
from ldm.pipeline.control import span
from ldm.rng import Rng
from tests.parity.test_diffusers_folder import make, save
from tests.parity.test_pipelines import BOUND, NEGATIVE, PROMPT, STEPS

torch.set_num_threads(1)
CASES: dict[str, list[dict[str, Any]]] = {
    "one": [{}],
    "weak": [{"scale": 0.4}],
    "some steps": [{"start": 0.25, "end": 0.8}],
    "guess": [{"guess": True, "scale": 0.9}],
    "two": [{"scale": 0.7}, {"scale": 0.5, "end": 0.6}],
    "shuffle": [{"pool": True}],
}


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def networks(folder: Path, parts: Any, uses: list[dict[str, Any]]) -> tuple[list[ControlNet], list[Any]]:
    """Ours and theirs of each use, with the same weights, none of them zero."""
    from diffusers import ControlNetModel

    from ldm.checkpoint.control_files import load_control, save_control

    ours, theirs = [], []
    for i, use in enumerate(uses):
        torch.manual_seed(i)
        made = ControlNet.copy_of(parts.network, 2)
        settings = {f: getattr(made.config, f) for f in made.config.__dataclass_fields__}
        made = ControlNet(ControlNetConfig(**settings | {"global_pool_conditions": use.get("pool", False)}))
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        with torch.no_grad():  # so that it is seen
            made.controlnet_mid_block.weight *= 5
            for conv in made.controlnet_down_blocks:
                conv.weight *= 5
        save_control(folder / f"control-{i}", made.config, made.state_dict())
        ours.append(load_control(folder / f"control-{i}"))
        theirs.append(ControlNetModel.from_pretrained(folder / f"control-{i}"))
    return ours, theirs


def drawn(folder: Path, noise: Tensor, controls: list[Control], **changes: Any) -> Tensor:
    pipe = TextToImage.load(folder)
    pipe = pipe.controlled(controls) if controls else pipe
    settings = Settings(**{"steps": 10, "guidance": 5.0, "size": (16, 24), "negative": NEGATIVE} | changes)
    return pipe.decode(pipe.latents([PROMPT], settings, Rng(0, (0,)), x=noise), settings)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("name", CASES)
def test_draws_as_theirs(family: str, name: str, tmp_path: Path) -> None:
    import diffusers

    uses = CASES[name]
    parts = make(family)
    save(parts, tmp_path / "ours")
    ours, theirs = networks(tmp_path, parts, uses)
    kind = "StableDiffusionControlNetPipeline" if family == "sd1" else "StableDiffusionXLControlNetPipeline"
    cls = getattr(diffusers, kind)
    one = len(uses) == 1
    pipe = cls.from_pretrained(tmp_path / "ours", controlnet=theirs[0] if one else theirs)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    shown = [picture(7 + i, (40, 30)) for i in range(len(uses))]  # of another size: stretched
    told = {
        "controlnet_conditioning_scale": [u.get("scale", 1.0) for u in uses],
        "control_guidance_start": [u.get("start", 0.0) for u in uses],
        "control_guidance_end": [u.get("end", 1.0) for u in uses],
        "image": shown,
    }
    told = {k: v[0] if one else v for k, v in told.items()} | {"guess_mode": any(u.get("guess") for u in uses)}
    wanted = pipe(PROMPT, negative_prompt=NEGATIVE, latents=noise, **told, **STEPS).images * 2 - 1
    controls = [
        Control(network=net, picture=image, **{k: v for k, v in use.items() if k != "pool"})
        for net, image, use in zip(ours, shown, uses, strict=True)
    ]
    found = drawn(tmp_path / "ours", noise, controls)
    plain = drawn(tmp_path / "ours", noise, [])
    assert (wanted - plain).abs().max() > 5 * BOUND  # the control is seen
    assert (found - wanted).abs().max() < BOUND
    if name == "one":
        off = [Control(network=ours[0], picture=shown[0], scale=0.0)]
        assert (drawn(tmp_path / "ours", noise, off) - plain).abs().max() < 1e-5


@pytest.mark.parametrize(("count", "start", "end"), [(10, 0.25, 0.8), (7, 0.0, 0.5), (5, 0.5, 0.55), (4, 0.0, 1.0)])
def test_the_steps_are_theirs(count: int, start: float, end: float) -> None:
    times = [999 - 990 * i / count for i in range(count)]
    between = span(times, start, end)
    keeps = [1.0 - float(i / count < start or (i + 1) / count > end) for i in range(count)]
    found = [1.0 if between is None else float(between[0] <= t <= between[1]) for t in times]
    assert found == keeps


@pytest.mark.parametrize("use", [{"guess": True}, {"pool": True}, {}])
def test_guess_mode_computes_the_prompts_half_alone(use: dict[str, Any], tmp_path: Path) -> None:
    """As in diffusers, whose ControlNet is given the prompt's rows there."""
    parts = make("sd1")
    save(parts, tmp_path / "ours")
    (net,), _ = networks(tmp_path, parts, [use])
    rows = []
    net.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    how = {k: v for k, v in use.items() if k != "pool"}
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    drawn(tmp_path / "ours", noise, [Control(network=net, picture=picture(7, (16, 24)), **how)], steps=2)
    assert set(rows) == {1 if use else 2}


def test_each_prompt_has_its_picture_whatever_the_batch(tmp_path: Path) -> None:
    parts = make("sd1")
    save(parts, tmp_path / "ours")
    (net,), _ = networks(tmp_path, parts, [{}])
    pictures = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    prompts = ["red", "green", "blue"]
    pipe = TextToImage.load(tmp_path / "ours")
    how = {"steps": 4, "guidance": 3.0, "size": (16, 24)}
    together = pipe.controlled([Control(network=net, picture=pictures)])
    all_at_once = together.sample(prompts, settings=Settings(**how))
    in_twos = together.sample(prompts, settings=Settings(**how, batch=2))
    alone = pipe.controlled([Control(network=net, picture=pictures[1])])
    second = alone.sample(["green"], settings=Settings(**how), indices=[1])
    assert (all_at_once - in_twos).abs().max() < 1e-4
    assert (all_at_once[1:2] - second).abs().max() < 1e-4
    assert (all_at_once[1] - all_at_once[2]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="3 conditions, but more prompts"):
        together.sample([*prompts, "more"], settings=Settings(**how))


def test_bad_uses_are_refused(tmp_path: Path) -> None:
    parts = make("sd1")
    (net,), _ = networks(tmp_path, parts, [{}])
    image = picture(0, (16, 16))
    for how, line in (
        ({"scale": -0.1}, r"edges: scale must be at least 0, got -0\.1"),
        ({"start": 0.8, "end": 0.2}, r"0 <= start < end <= 1; got 0\.8, 0\.2"),
        ({"picture": torch.zeros(1, 16, 16)}, "edges: a condition of 1 channels, but this ControlNet takes 3"),
        ({"picture": torch.full((3, 16, 16), -1.0)}, r"a condition lies in \[0, 1\], got values from -1 to -1"),
    ):
        with pytest.raises(ValueError, match=line):
            Control(**{"network": net, "picture": image, "name": "edges"} | how)
    save(parts, tmp_path / "ours")
    pipe = TextToImage.load(tmp_path / "ours").controlled([Control(network=net, picture=torch.zeros(3, 16, 16))])
    with pytest.raises(ValueError, match="a condition of 16 x 16 pixels, but 16 x 24 are drawn"):
        pipe("x", steps=1, size=(16, 24))
    x, t = torch.zeros(1, 4, 8, 8), torch.zeros(1)
    with pytest.raises(ValueError, match="needs a picture as cond 'condition'"):
        net(x, t, {"text": torch.zeros(1, 3, 8)})
    with pytest.raises(ValueError, match="a picture of 1 channels, but this ControlNet takes 3"):
        net(x, t, {"condition": torch.zeros(1, 1, 16, 16)})
    wide = TextToImage.load(tmp_path / "ours")
    other, _ = networks(tmp_path / "xl", make("sdxl"), [{}])
    with pytest.raises(ValueError, match="xl is a ControlNet of Stable Diffusion XL, but the model is Stable"):
        wide.controlled([Control(network=other[0], picture=image, name="xl")])
