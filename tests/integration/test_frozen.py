"""Trainings over stored weights: every ZeRO stage, resuming, what is written, and the loss that they reach."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.config.load import decode, dump
from ldm.config.schema import RunConfig
from ldm.data.images import to_uint8
from ldm.data.loader import DataConfig, Loader
from ldm.models.frozen import Stored
from ldm.pipeline import TextToImage
from ldm.recipes import assemble
from ldm.recipes.run import run
from ldm.train import trainer
from tests import miniature, ranks

torch.set_num_threads(1)
SLOW = 900.0
DRAW = {"sampler": "ddim", "steps": 1, "guidance": 2.0}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny whole model, and a folder of pictures with captions."""
    root = miniature.project(tmp_path_factory.mktemp("frozen"))
    miniature.teacher(root)
    (root / "subject").mkdir()
    for color in ("red", "green", "blue", "white"):
        (root / "subject" / f"{color}.png").write_bytes(miniature.picture(color, "cross"))
        (root / "subject" / f"{color}.txt").write_text(f"a {color} cross\n")
    return root


def config(root: Path, out: str, frozen: str, stage: int, task: dict[str, Any]) -> dict[str, Any]:
    engine = {"zero_stage": stage, "precision": "fp32", "frozen": frozen}
    train = miniature.train(
        steps=4, ema=None, optim={"lr": 1e-2, "weight_decay": 0.0}, checkpoint={"every": 2, "keep": 0}, engine=engine
    )
    common = {"base": str(root / "teacher"), "samples": {"prompts": ["a red dot"], "every": 2, "settings": DRAW}}
    data = {"kind": "shards", "path": str(root / out / "data"), "size": miniature.SIZE}
    return {"name": out, "out": str(root / out), "task": common | task, "data": data, "train": train}


def lora(root: Path, **adapter: Any) -> dict[str, Any]:
    own = {"kind": "lora", "rank": 2, "text": True, "targets": ["attention", "convolution"]}
    return {"kind": "finetune", "images": str(root / "subject"), "adapter": own | adapter}


def inversion(root: Path) -> dict[str, Any]:
    thing = {"token": "<thing>", "initializer": ["red"], "images": str(root / "subject")}
    return {"kind": "textual_inversion", "concepts": [thing], "samples": {"prompts": []}}


def train(tree: dict[str, Any], stop_at: int | None = None) -> int:
    """What `ldm train` does, in this process; stopped as by a signal after `stop_at` steps."""
    told = decode(RunConfig, tree)
    if stop_at is not None:
        _stop_after(stop_at)
    build = lambda: assemble(told.task, told.data, told.train, told.seed, told.workers)  # noqa: E731
    with contextlib.redirect_stderr(io.StringIO()):
        return run(build, told.train, told.out, seed=told.seed, resolved=dump(told))


def _stop_after(steps: int) -> None:
    """The signal's flag is set before step `steps` runs; the rank is forked, so that nothing is to be undone."""
    original = trainer.Trainer._one_step

    def one_step(self: Any, *args: Any) -> Any:
        out = original(self, *args)
        if self.step == steps - 1:
            trainer.Stop.asked = property(lambda _: True, lambda *_: None)  # type: ignore[assignment, method-assign]
        return out

    trainer.Trainer._one_step = one_step  # type: ignore[method-assign]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    paths = sorted((folder / "export").glob("*.safetensors"))
    return {f"{path.name}:{k}": v for path in paths for k, v in load_file(path).items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Share of values that differ; Adam moves a value whose gradient is zero but for rounding either way."""
    wrong = sum(int(((a[k] - b[k]).abs() > 2e-4).sum()) for k in a)
    return wrong / sum(v.numel() for v in a.values())


CASES = {"int8": lambda root: lora(root, dora=True), "nf4": lora, "bf16": inversion}


@pytest.mark.parametrize("frozen", ["int8", *(pytest.param(f, marks=pytest.mark.slow) for f in ("nf4", "bf16"))])
def test_every_stage_on_one_and_two_ranks_and_resumed(frozen: str, project: Path) -> None:
    """What is frozen stays outside of the engine, so that nothing of it is divided, cast or written."""
    if frozen == "nf4":
        pytest.importorskip("bitsandbytes")
    task = CASES[frozen](project)
    alone = config(project, f"{frozen}-alone", frozen, 1, task)
    assert ranks.run(train, 1, alone, timeout=SLOW) == [0]
    first = exported(Path(alone["out"]))
    assert first
    stages = range(4) if frozen == "int8" else (1, 3)
    for stage in stages:
        tree = config(project, f"{frozen}-{stage}", frozen, stage, task)
        assert ranks.run(train, 2, tree, timeout=SLOW) == [0, 0]
        found = exported(Path(tree["out"]))
        assert set(found) == set(first)
        assert differing(found, first) < 0.02
    halves = config(project, f"{frozen}-halves", frozen, 3, task)
    assert ranks.run(train, 2, halves, 2, timeout=SLOW) == [trainer.AGAIN] * 2
    assert ranks.run(train, 2, halves, timeout=SLOW) == [0, 0]
    assert all(torch.equal(v, found[k]) for k, v in exported(Path(halves["out"])).items())
    base = TextToImage.load(str(project / "teacher"))
    count = sum(p.numel() for p in base.network.parameters())
    for path in Path(halves["out"]).rglob("checkpoints/*/*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        assert {t.dtype for t in tensors} <= {torch.float32}
        assert sum(t.numel() for t in tensors) < count / 4  # corrections and their moments
    merged_into_the_base_as_it_is(base, halves)
    changed = config(project, f"{frozen}-halves", "fp32", 3, task)
    changed["train"]["steps"] = 5
    with pytest.raises(ValueError, match=rf"other frozen weights \(train.engine.frozen '?{frozen}'? → '?fp32"):
        train(changed)


def merged_into_the_base_as_it_is(base: TextToImage, tree: dict[str, Any]) -> None:
    """Loading the run merges its corrections into float32 weights; of layers that it does not correct, no bit moves."""
    tuned = TextToImage.load(tree["out"])
    moved = 0
    for name, before in base.network.state_dict().items():
        after = tuned.network.state_dict()[name]
        assert after.dtype == torch.float32
        moved += not torch.equal(before, after)
        if name.endswith("bias") or "norm" in name or name.startswith("time_embedding"):
            assert torch.equal(before, after), name
    assert bool(moved) == (tree["task"]["kind"] == "finetune")


def told(tree: dict[str, Any], out: Path, steps: int) -> dict[str, Any]:
    """One of the miniature's configs in a folder of its own, with frozen parts in 8 bits."""
    train = miniature.train(steps=steps, engine={"zero_stage": 2, "precision": "fp32", "frozen": "int8"})
    data = {"kind": "shards", **tree["data"]}
    return tree | {"name": out.name, "out": str(out), "train": train, "data": data}


def test_a_full_training_stores_what_is_beside_and_exports_it_as_it_was(project: Path) -> None:
    tree = told(miniature.text_to_image(project), project / "whole", steps=1)
    run = decode(RunConfig, tree)
    assembly = assemble(run.task, run.data, run.train, run.seed, run.workers)
    assert not any(isinstance(m, Stored) for m in assembly.objective.modules())
    assert ranks.run(train, 1, tree, timeout=SLOW) == [0]
    export, whole = TextToImage.load(tree["out"]), TextToImage.load(str(project / "teacher"))
    for one, other in ((export.codec.autoencoder, whole.codec.autoencoder), (export.text[0], whole.text[0])):
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


@pytest.mark.parametrize(
    "changes", [{"lora": {"kind": "lora", "rank": 2}, "guidance_embedding": None}, {}], ids=["lora", "whole"]
)
def test_a_teacher_is_stored_and_the_export_holds_the_base(changes: dict[str, Any], project: Path) -> None:
    name = f"distilled-{len(changes)}"
    tree = told(miniature.distill(project, {"kind": "lcm"}, **changes), project / name, steps=2)
    assert ranks.run(train, 2, tree, timeout=SLOW) == [0, 0]
    base, student = TextToImage.load(str(project / "teacher")), TextToImage.load(tree["out"])
    for one, other in ((student.codec.autoencoder, base.codec.autoencoder), (student.text[0], base.text[0])):
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())
    before, after = (dict(pipeline.network.named_parameters()) for pipeline in (base, student))
    off = [float((after[name] - p).detach().abs().max()) for name, p in before.items()]
    assert 0 < max(off) < 0.05  # two steps from the teacher as it is, not as it was stored


def test_what_cannot_be_is_said_in_a_line(project: Path) -> None:
    tree = config(project, "wrong", "int8", 1, lora(project))
    tree["train"]["engine"]["compile"] = "blocks"
    with pytest.raises(ValueError, match=r"compile: 'blocks' with frozen 'int8': compiled code would keep weights"):
        decode(RunConfig, tree)
    tree["train"]["engine"]["frozen"] = "bf16"
    decode(RunConfig, tree)
    vae = told(miniature.autoencoder(project), project / "vae", steps=1)
    with pytest.raises(ValueError, match=r"frozen: 'int8', but everything trains in the task autoencoder; write fp32"):
        decode(RunConfig, vae)


# --- the loss on the embedded emoji -----------------------------------------------------------------------------------
STEPS, LAST = 60, 20
MARGIN = {"bf16": 0.02, "int8": 0.02, "nf4": 0.05}
"""Of the loss over float32, 0.695, the mean of the last 20 of 60 steps. Measured: +0.0003, +0.0004 and -0.003."""


def inverted_emoji(root: Path) -> Path:
    """Twelve embedded pictures in their complementary colours, which the shipped model draws badly."""
    folder = root / "inverted"
    folder.mkdir()
    batch = Loader(DataConfig(path="emoji", split="train", size=64), seed=0, micro_batch=12).batch(0, 0)
    for i, (pixels, caption) in enumerate(zip(to_uint8(batch["image"]), batch["caption"], strict=True)):
        ImageOps.invert(Image.fromarray(pixels)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{caption}\n")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_lora_reaches_the_loss_of_one_over_float32(tmp_path: Path) -> None:
    """The same seed, pictures and noise on the shipped model, whose loss begins at more than thrice what is reached."""
    pytest.importorskip("bitsandbytes")
    images, losses = inverted_emoji(tmp_path), {}
    for frozen in ("fp32", *MARGIN):
        adapter = {"kind": "lora", "rank": 4, "targets": ["attention", "feed_forward"]}
        task = {"kind": "finetune", "base": "emoji", "images": str(images), "adapter": adapter}
        task |= {"cache": str(tmp_path / "cache"), "samples": {"prompts": []}}
        train_told = {
            "steps": STEPS, "batch": 4, "optim": {"lr": 4e-3, "weight_decay": 0.01}, "ema": None, "threads": 1,
            "engine": {"precision": "fp32", "frozen": frozen}, "log": {"every": 1, "tensorboard": False},
        }  # fmt: skip
        data = {"kind": "shards", "path": str(tmp_path / "data"), "size": 64, "last": "wrap"}
        out = tmp_path / frozen
        tree = {"name": frozen, "out": str(out), "seed": 0, "task": task, "data": data, "train": train_told}
        assert ranks.run(train, 1, tree, timeout=SLOW) == [0]
        rows = [json.loads(line) for line in (out / "log" / "metrics.jsonl").read_text().splitlines()]
        losses[frozen] = [row["loss"] for row in rows if "loss" in row]
        assert len(losses[frozen]) == STEPS
    reached = {frozen: sum(found[-LAST:]) / LAST for frozen, found in losses.items()}
    assert reached["fp32"] < sum(losses["fp32"][:LAST]) / LAST / 3
    for frozen, margin in MARGIN.items():
        assert reached[frozen] <= (1 + margin) * reached["fp32"], reached
