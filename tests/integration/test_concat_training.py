"""U-Nets that are told a picture by more channels, trained in miniature: from scratch and from a base of latents alone,
divided, stopped and resumed, exported, and drawn as diffusers' pipeline of the same folder draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.config.load import decode
from ldm.config.schema import RunConfig
from ldm.pipeline import Settings, TextToImage
from ldm.recipes import assemble
from ldm.rng import Rng
from ldm.train import trainer
from tests import miniature, ranks
from tests.integration.test_finetune import SLOW, exported, train

torch.set_num_threads(1)
MASK = (slice(4, 12), slice(2, 14))
"""Of the fixed mask: whole latent pixels."""
NOISE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
KINDS: dict[str, dict[str, Any]] = {
    "inpaint": {
        "pairs": {"inpaint_mask": {"kind": "random_mask"}, "masked": {"kind": "masked"}},
        "network": {"in_channels": 9},
        "pipeline": "StableDiffusionInpaintPipeline",
    },
    "instruct": {
        "pairs": {"original": {"kind": "blur", "sigma": 2.0, "cache": "latents"}},
        "network": {"in_channels": 8},
        "pipeline": "StableDiffusionInstructPix2PixPipeline",
    },
    "upscale": {
        "pairs": {"small": {"kind": "small", "factor": 2}},
        "network": {"in_channels": 7, "num_class_embeds": 1000},
        "pipeline": "StableDiffusionUpscalePipeline",
    },
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = miniature.project(tmp_path_factory.mktemp("concat"))
    miniature.teacher(root)
    (root / "photo.png").write_bytes(miniature.picture("red", "cross"))
    mask = np.zeros((miniature.SIZE, miniature.SIZE), np.uint8)
    mask[MASK] = 255
    Image.fromarray(mask).save(root / "mask.png")
    Image.fromarray(mask[:8]).save(root / "short.png")
    Image.fromarray(np.full_like(mask, 255)).save(root / "white.png")
    return root


def samples(root: Path, kind: str) -> dict[str, Any]:
    told: dict[str, Any] = {"prompts": ["a red dot"], "every": 2, "settings": {"steps": 2, "guidance": 2.0}}
    told["pictures"] = [str(root / "photo.png")]
    return told | ({"masks": [str(root / "mask.png")]} if kind == "inpaint" else {})


def config(root: Path, kind: str, out: str, *, base: bool = False, stage: int = 1, **task: Any) -> dict[str, Any]:
    tree = miniature.text_to_image(root)
    options = {"drop": 0.2, "concat": {"kind": kind}}
    if base:
        tree["task"] = {"kind": "finetune", "base": str(root / "teacher"), "adapter": {"kind": "full"}}
    else:
        tree["task"]["network"] |= KINDS[kind]["network"]
    tree["task"] |= {"options": options, "samples": samples(root, kind)} | task
    tree["data"] |= {"kind": "shards", "pairs": KINDS[kind]["pairs"]}
    plain = {"steps": 4, "optim": {"lr": 1e-2, "weight_decay": 0.0}, "checkpoint": {"every": 2, "keep": 0}}
    tree["train"] = miniature.train(**plain, engine={"zero_stage": stage, "precision": "fp32"})
    return tree | {"name": out, "out": str(root / out)}


def given(pipe: TextToImage, kind: str, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
    if kind == "upscale":
        return pipe.concat.small(shrunk(image), 20, NOISE)
    return pipe.concat.inpainting(image, mask) if kind == "inpaint" else pipe.concat.original(image)


def shrunk(image: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(image, 2)


def theirs(pipe: Any, kind: str, image: Tensor, mask: Tensor, how: dict[str, Any], tell: Any) -> Tensor:
    """Their picture in [-1, 1]. They draw from the posterior of the masked picture; here its mode is taken."""
    if kind == "upscale":
        import diffusers

        module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale
        tell.setattr(module, "randn_tensor", lambda *_, **__: NOISE)
        return pipe(image=(shrunk(image) + 1) / 2, noise_level=20, **how).images * 2 - 1
    if kind == "instruct":
        return pipe(image=image, image_guidance_scale=1.5, **how).images * 2 - 1
    tell.setattr(pipe, "_encode_vae_image", lambda image, generator: pipe.vae.encode(image).latent_dist.mode()
                 * pipe.vae.config.scaling_factor)  # fmt: skip
    return pipe(image=image, mask_image=mask, **how).images * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_base_in_one_process(kind: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins as the base; what is exported is drawn as their pipeline draws it, and follows the picture."""
    import diffusers

    out = project / f"{kind}-base"
    assert ranks.run(train, 1, config(project, kind, out.name, base=True), timeout=SLOW) == [0]
    drawn = [np.asarray(Image.open(path)).astype(int) for path in sorted((out / "samples").glob("step-*.png"))]
    assert len(drawn) == 3
    assert (drawn[0] != drawn[-1]).any()
    pipe = diffusers.DiffusionPipeline.from_pretrained(out / "export")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == KINDS[kind]["pipeline"]
    pixels = np.array(Image.open(project / "photo.png").convert("RGB"))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    mask = torch.from_numpy(np.asarray(Image.open(project / "mask.png")) / 255.0)[None, None].float()
    ours, noise = TextToImage.load(out), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    settings = Settings(steps=6, guidance=3.0, image_guidance=1.5 if kind == "instruct" else None)
    how = {"prompt": "a red dot", "latents": noise, "num_inference_steps": 6, "guidance_scale": 3.0,
           "output_type": "pt"}  # fmt: skip

    def mine(image: Tensor) -> Tensor:
        told = given(ours, kind, image, mask)
        return ours.decode(ours.latents(["a red dot"], settings, Rng(0, (0,)), x=noise, given=told), settings)

    expected = theirs(pipe, kind, image, mask, how, monkeypatch)
    found = mine(image)
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-3
    assert (mine(-image) - found).abs().max() > 1e-3
    with pytest.raises(ValueError, match="use `ldm edit"):
        ours(["a red dot"], steps=2)


@pytest.mark.parametrize(
    "kind", ["inpaint", *(pytest.param(k, marks=pytest.mark.slow) for k in ("instruct", "upscale"))]
)
def test_from_scratch_in_two_processes_and_resumed(kind: str, project: Path) -> None:
    """ZeRO 3 on two ranks over cached pictures, stopped and resumed, is bit for bit one run; without a cache it trains
    too, and its first loss is that of the cache to rounding."""
    cached = {"cache": str(project / f"cache-{kind}")}
    runs = {k: config(project, kind, f"{kind}-{k}", stage=3, **cached) for k in ("whole", "halves")}
    assert ranks.run(train, 2, runs["whole"], timeout=SLOW) == [0, 0]
    assert ranks.run(train, 2, runs["halves"], 2, timeout=SLOW) == [trainer.AGAIN] * 2
    assert ranks.run(train, 2, runs["halves"], timeout=SLOW) == [0, 0]
    found = {k: exported(project / f"{kind}-{k}") for k in runs}
    assert found["whole"]
    assert all(torch.equal(found["whole"][k], found["halves"][k]) for k in found["whole"])
    first = next(v for k, v in found["whole"].items() if k.endswith("conv_in.weight"))
    assert first.shape[1] == KINDS[kind]["network"]["in_channels"]


def line(tree: dict[str, Any]) -> str:
    try:
        told = decode(RunConfig, tree)
        assemble(told.task, told.data, told.train, 0, 0)
    except ValueError as error:
        return str(error)
    return ""


def test_bad_inpainting_is_refused_in_one_line(project: Path) -> None:
    plain = config(project, "inpaint", "bad")
    drawn = lambda **changes: {"samples": samples(project, "inpaint") | changes}  # noqa: E731
    for changes, says in (
        ({"samples": {"prompts": ["a"]}}, "samples.pictures: 0 for 1 samples.prompts"),
        (drawn(masks=[]), "samples.masks: 0 for 1 samples.prompts"),
        (drawn(masks=[str(project / "white.png")]), "white.png' is all white"),
        (drawn(masks=[str(project / "short.png")]), "16 x 8 pixels, its picture has 16 x 16"),
        ({"options": {"concat": {"kind": "inpaint", "outside": 2.0}}}, "outside must be in [0, 1], got 2.0"),
        ({"options": {}}, "in_channels: 9, but task.vae"),
        ({"network": plain["task"]["network"] | {"in_channels": 4}}, "to which task.options.concat adds 5"),
        ({"options": {"concat": {"kind": "inpaint"}, "small": {"until": 3}}}, "small: pictures that are concatenated"),
    ):
        told = line(config(project, "inpaint", "bad", **changes))
        assert says in told
        assert "\n" not in told
    for pairs, says in (
        ({}, "data.pairs: no 'inpaint_mask', which task.options.concat 'inpaint' takes, only []; such as inpaint_mask"),
        ({"inpaint_mask": {"kind": "random_mask"}}, "data.pairs: no 'masked'"),
    ):
        assert says in line(plain | {"data": plain["data"] | {"pairs": pairs}})
    lora = config(project, "inpaint", "bad", base=True, adapter={"kind": "lora", "rank": 2})
    assert "takes 4 channels, but 9 are given with task.options.concat 'inpaint'; adapter full widens" in line(lora)
    control = {"kind": "controlnet", "base": str(project / "teacher"), "options": {"concat": {"kind": "inpaint"}}}
    assert "options.concat: a ControlNet's base is told no picture itself" in line(plain | {"task": control})


def test_bad_upscaling_is_refused_in_one_line(project: Path) -> None:
    plain = config(project, "upscale", "bad")
    for pair, says in (
        (
            {"kind": "small", "factor": 4},
            "pairs.small.factor: 4, but the autoencoder's latents are 2 times smaller",
        ),
        ({"kind": "small", "factor": 2, "enlarge": True}, "expected {kind: small, factor: 2}, not enlarged"),
        ({"kind": "blur"}, "data.pairs.small: expected {kind: small, factor: 2}"),
    ):
        assert says in line(plain | {"data": plain["data"] | {"pairs": {"small": pair}}})
    classes = lambda count: plain["task"]["network"] | {"num_class_embeds": count}  # noqa: E731
    assert "has num_class_embeds 100, but task.options.concat.noise.levels is 350" in line(
        config(project, "upscale", "bad", network=classes(100))
    )
    assert "has num_class_embeds None" in line(config(project, "upscale", "bad", network=classes(None)))


def test_bad_edits_are_refused_in_one_line(project: Path) -> None:
    plain = config(project, "instruct", "bad")
    assert "data.pairs: no 'original'" in line(plain | {"data": plain["data"] | {"pairs": {}}})
    masked = {"samples": samples(project, "inpaint")}
    assert "samples.masks: the network is told of none" in line(config(project, "instruct", "bad", **masked))
    latents = config(project, "instruct", "bad", options={"concat": {"kind": "instruct", "drop": 0.9, "both": 0.2}})
    assert "must not be more than 1 together" in line(latents)
