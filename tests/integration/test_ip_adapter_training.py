"""An IP-Adapter trained in miniature over a frozen base: divided, stopped and resumed, exported, loaded, drawn with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ldm.checkpoint.ip_adapter_files import NAME, load_ip_adapter
from ldm.cli import finetune
from ldm.cli import sample as cli
from ldm.config.load import decode
from ldm.config.schema import RunConfig
from ldm.pipeline import ImagePrompt, Settings, TextToImage
from ldm.recipes.image_prompts import load_pair
from ldm.train import trainer
from tests import miniature, ranks
from tests.integration.test_controlnet_training import log
from tests.integration.test_finetune import SLOW, exported, train

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = miniature.project(tmp_path_factory.mktemp("ip_adapter"))
    miniature.teacher(root)
    for name in ("red", "blue"):
        pixels = np.full((20, 20, 3), 255, dtype=np.uint8)
        pixels[5:15, 5:15] = miniature.COLORS[name]
        Image.fromarray(pixels).save(root / f"{name}.png")
    return root


def config(root: Path, out: str, *, engine: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    how = {"sampler": "ddim", "steps": 2, "guidance": 2.0}
    task = {
        "kind": "ip_adapter", "base": str(root / "teacher"), "image_encoder": str(root / "towers"),
        "samples": {"prompts": ["a red dot", "a dot"], "every": 2, "settings": how},
        "references": [str(root / "red.png"), str(root / "blue.png")],
    }  # fmt: skip
    data = {"kind": "shards", "path": str(root / "data"), "size": miniature.SIZE}
    plain = miniature.train(steps=4, optim={"lr": 1e-2, "weight_decay": 0.0}, checkpoint={"every": 2, "keep": 0})
    plain["engine"] = {"zero_stage": 1, "precision": "fp32"} | (engine or {})
    return {"name": out, "out": str(root / out), "task": task | changes, "data": data, "train": plain}


@pytest.fixture(scope="module")
def out(project: Path) -> Path:
    """A run that is done."""
    assert ranks.run(train, 1, config(project, "one"), timeout=SLOW) == [0]
    return project / "one"


def test_one_process_trains_the_adapter_alone_and_its_export_draws(project: Path, out: Path) -> None:
    rows = log(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["image_sensitivity"] != 0 for row in rows)
    net, encoder = load_pair(str(out))
    base = TextToImage.load(project / "teacher")
    first = base.network.attention_layers()
    to_k = next(layer for _, layer, looks in first if looks == "cross").to_k.weight
    assert not torch.equal(net.ip_adapter["1"].to_k_ip.weight, to_k)  # it began there
    assert (net.ip_adapter["1"].to_k_ip.weight - to_k).abs().max() < 0.1
    picture = Image.open(project / "red.png")
    settings = Settings(steps=2, guidance=2.0)
    plain = base.sample(["a red dot"], settings=settings)
    prompt = ImagePrompt(adapter=net, encoder=encoder, picture=picture)
    seen = base.image_prompted([prompt]).sample(["a red dot"], settings=settings)
    assert (plain - seen).abs().max() > 1e-4
    drawn = [np.asarray(Image.open(p)) for p in sorted((out / "samples").glob("step-*.png"))]
    assert len(drawn) == 3
    assert (drawn[0] != drawn[-1]).any()
    with pytest.raises(ValueError, match=r"an IP-Adapter; draw with it by --image-prompt PICTURE --ip-adapter .*"):
        TextToImage.load(out)


def test_diffusers_loads_the_export(project: Path, out: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(project / "teacher")
    pipe.load_ip_adapter(
        str(out / "export"), subfolder="", weight_name=NAME, image_encoder_folder=None, low_cpu_mem_usage=False
    )
    net = load_ip_adapter(out)
    found = {k: v for k, v in pipe.unet.state_dict().items() if "_ip." in k}
    assert len(found) == len(list(net.ip_adapter.parameters()))
    assert torch.equal(
        pipe.unet.encoder_hid_proj.image_projection_layers[0].image_embeds.weight,
        net.image_proj.get_parameter("proj.weight"),
    )


def test_two_processes_stage_3_resume_and_start(project: Path) -> None:
    """ZeRO 3 on two ranks over cached latents and states, stopped and resumed, is bit for bit one run."""
    cached = {"cache": str(project / "cache"), "form": "plus", "tokens": 3}
    runs = {k: config(project, f"z-{k}", engine={"zero_stage": 3}, **cached) for k in ("whole", "halves")}
    assert ranks.run(train, 2, runs["whole"], timeout=SLOW) == [0, 0]
    assert ranks.run(train, 2, runs["halves"], 2, timeout=SLOW) == [trainer.AGAIN] * 2
    assert ranks.run(train, 2, runs["halves"], timeout=SLOW) == [0, 0]
    found = {k: exported(project / f"z-{k}") for k in runs}
    assert found["whole"]
    assert all(torch.equal(found["whole"][k], found["halves"][k]) for k in found["whole"])
    pictures = [(project / f"z-{k}" / "samples" / "step-0000004.png").read_bytes() for k in runs]
    assert pictures[0] == pictures[1]
    more = config(project, "more", start=str(project / "z-whole"), **cached)
    assert ranks.run(train, 1, more, timeout=SLOW) == [0]
    assert set(exported(project / "z-whole")) == set(exported(project / "more"))


def test_the_command_draws_with_it_and_draws_again(
    project: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "ref.png"
    picture.write_bytes((project / "red.png").read_bytes())
    plain = ["a red dot", "--model", str(project / "teacher"), "--steps", "2", "--device", "cpu"]
    own = [*plain, "--ip-adapter", str(out)]
    assert cli.main([*own, "--image-prompt", f"{picture}:0.6", "--out", str(tmp_path / "first")]) == 0
    (first,) = (tmp_path / "first").glob("0000*.png")
    capsys.readouterr()
    assert cli.main(["--from-png", str(first), "--out", str(tmp_path / "second")]) == 0
    assert "another" not in capsys.readouterr().err
    assert np.array_equal(Image.open(first), Image.open(tmp_path / "second" / first.name))
    Image.open(project / "blue.png").save(picture)
    assert cli.main(["--from-png", str(first), "--out", str(tmp_path / "third")]) == 0
    assert "drawn with other image prompts: the picture will be another" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("no picture")
    teacher = str(project / "teacher")
    for bad, line in (
        ([*own, "--image-prompt", f"{picture}:-1"], r"scale must be at least 0, got -1\.0"),
        ([*own, "--image-prompt", "nothing.png"], "'nothing.png': no such picture"),
        ([*own, "--image-prompt", str(tmp_path / "text.png")], "text.png: not a readable picture"),
        ([*plain, "--image-prompt", str(picture)], "--image-prompt: add --ip-adapter FILE"),
        (own, "--ip-adapter: is of pictures that are prompts; add --image-prompt"),
        ([*own, "--ip-adapter", "b", "--ip-adapter", "c", "--image-prompt", str(picture)], "--ip-adapter: 3 for 1"),
        ([*plain, "--ip-adapter", "nothing", "--image-prompt", str(picture)], "nothing: no IP-Adapter: no such file"),
        (
            [*plain, "--ip-adapter", teacher, "--image-prompt", str(picture)],
            "no ip_adapter.safetensors in this folder",
        ),
        (
            [*own, "--image-prompt", str(picture), "--image-encoder", "clip_emoji"],
            "clip_emoji gives embeddings of 192 features, but this IP-Adapter takes 16",
        ),
        (
            ["a", "--ip-adapter", str(out), "--image-prompt", str(picture), "--device", "cpu"],
            r"is an IP-Adapter of a U-Net of its own, but the model is Stable Diffusion 1: .*",
        ),
    ):
        with pytest.raises(ValueError, match=line):
            cli.main(bad)


def test_one_command_writes_the_whole_config(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["ip_adapter", "--images", str(project), "--base", str(project / "teacher"), "--size", "16", "--print-config"]
    told = ["--image-encoder", str(project / "towers"), "--form", "plus", "--prompt", "a dot"]
    assert finetune.main([*own, *told, "--validation-image", str(project / "red.png")]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["task"]["kind"] == "ip_adapter"
    assert tree["task"]["form"] == "plus"
    assert tree["task"]["references"] == [str(project / "red.png")]
    assert (tree["task"]["drop_image"], tree["task"]["drop_both"], tree["task"]["options"]["drop"]) == (0.1, 0.05, 0.1)
    assert tree["train"]["optim"]["lr"] == 1e-4
    with pytest.raises(ValueError, match=r"references: 0 pictures for 1 samples\.prompts"):
        finetune.main([*own, *told])


def test_bad_configs_are_refused(project: Path, out: Path) -> None:
    from ldm.recipes import assemble

    def line(**changes: Any) -> str:
        try:
            told = decode(RunConfig, config(project, "bad", **changes))
            assemble(told.task, told.data, told.train, 0, 0)
        except ValueError as error:
            return str(error)
        return ""

    assert "drop_both: 0.2 is part of drop_image 0.1" in line(drop_both=0.2)
    assert "is more than all samples" in line(drop_image=0.95, options={"drop": 0.5})
    assert "drop_image must be in [0, 1], got -0.1" in line(drop_image=-0.1)
    assert "published files of form plain have 4" in line(tokens=8)
    assert "options.drop_warmup: captions and pictures are dropped together" in line(options={"drop_warmup": 2})
    assert "no multiple of train.log.every" in line(sensitivity=3) or miniature.train()["log"]["every"] == 1
    assert "not a shipped model" in line(image_encoder="nothing/here/at/all")
    assert "task.form: 'plus', but task.start" in line(start=str(out), form="plus")
    assert "'clip_emoji' gives 192 features, but task.start" in line(start=str(out), image_encoder="clip_emoji")
    assert "no IP-Adapter: no such file or folder" in line(start=str(project / "nothing"))
