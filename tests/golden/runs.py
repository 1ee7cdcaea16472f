"""The runs whose figures are kept: every task kind on the miniature project, three steps in float32."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests import miniature, ranks

HERE = Path(__file__).parent
LOSSES, MADE = HERE / "losses.json", HERE / "made"
DRAW = {"sampler": "ddim", "steps": 2, "guidance": 2.0}
Figures = dict[str, Any]


def project(root: Path) -> Path:
    """Data, autoencoder, CLIP, a teacher and pictures of a subject below `root`."""
    miniature.project(root)
    miniature.teacher(root)
    for name, color in (("subject", "red"), ("style", "blue")):
        (root / name).mkdir()
        for shape in miniature.SHAPES:
            (root / name / f"{shape}.png").write_bytes(miniature.picture(color, shape))
            (root / name / f"{shape}.txt").write_text(f"a {color} {shape}\n")
    return root


def _train(**changes: Any) -> dict[str, Any]:
    return miniature.train(steps=3, checkpoint={"every": 100, "keep": 1}, **changes)


def _distill(root: Path, method: dict[str, Any], **task: Any) -> dict[str, Any]:
    return miniature.distill(root, method, **task) | {"train": _train()}


def _tuned(root: Path, name: str, task: dict[str, Any]) -> dict[str, Any]:
    """A fine-tuning of the teacher."""
    own: dict[str, Any] = {"path": str(root / name / "data" / "subject"), "size": miniature.SIZE}
    second = {"dreambooth": "class", "textual_inversion": "style"}.get(task["kind"])
    if second is not None:
        other = {"path": str(root / name / "data" / second), "size": miniature.SIZE}
        own = {"kind": "mixture", "sources": [{"data": own}, {"data": other, "weight": 0.7}]}
    common = {
        "base": str(root / "teacher"),
        "cache": str(root / name / "cache"),
        "samples": {"prompts": [], "settings": DRAW},
    }
    optim = {"lr": 1.0e-2, "weight_decay": 0.0}
    return {"task": common | task, "data": {"kind": "shards", **own}, "train": _train(ema=None, optim=optim)}


def _dreambooth(root: Path, name: str, adapter: dict[str, Any]) -> dict[str, Any]:
    prior = {"count": 4, "settings": DRAW | {"batch": 2}}
    task = {"kind": "dreambooth", "images": str(root / "subject"), "identifier": "sks", "noun": "cross"}
    return _tuned(root, name, task | {"prior": prior, "adapter": adapter})


def _inversion(root: Path, name: str) -> dict[str, Any]:
    thing = {"token": "<thing>", "vectors": 2, "initializer": ["red"], "images": str(root / "subject")}
    look = {"token": "<look>", "initializer": ["blue"], "learn": "style", "images": str(root / "style")}
    return _tuned(root, name, {"kind": "textual_inversion", "concepts": [thing, look]})


def _finetune(root: Path, name: str, adapter: dict[str, Any]) -> dict[str, Any]:
    return _tuned(root, name, {"kind": "finetune", "images": str(root / "subject"), "adapter": adapter})


_LORA = {"kind": "lora", "rank": 2, "text": True, "targets": ["attention", "convolution"], "dropout": 0.1}
_DMD = {"kind": "dmd", "w": [1.0, 1.0], "steps": [1, 2, 4], "solver_steps": 8, "every": 2, "adversarial": 0.01}
KINDS: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "text_to_image": lambda root, _: miniature.text_to_image(root) | {"train": _train()},
    "text_to_image, cached, checkpointing": lambda root, name: (
        miniature.text_to_image(root, cache=str(root / name / "cache"), gradient_checkpointing=True)
        | {"train": _train(engine={"zero_stage": 3, "precision": "fp32"})}
    ),
    "text_to_image, start": lambda root, _: (
        miniature.text_to_image(root, start=str(root / "teacher")) | {"train": _train()}
    ),
    "autoencoder": lambda root, _: miniature.autoencoder(root) | {"train": _train()},
    "clip": lambda root, _: miniature.contrastive(root) | {"train": _train()},
    "progressive": lambda root, _: _distill(root, {"kind": "progressive", "steps": 4, "until": 2}),
    "lcm": lambda root, _: _distill(root, {"kind": "lcm"}),
    "lcm, lora": lambda root, _: _distill(root, {"kind": "lcm"}, guidance_embedding=None, lora={"rank": 2}),
    "tcd": lambda root, _: _distill(root, {"kind": "tcd"}),
    "dmd": lambda root, _: _distill(root, _DMD),
    "finetune, full": lambda root, name: _finetune(root, name, {"kind": "full", "text": True}),
    "finetune, lora": lambda root, name: _finetune(root, name, _LORA),
    "dreambooth, full": lambda root, name: _dreambooth(root, name, {"kind": "full", "text": False}),
    "dreambooth, dora": lambda root, name: _dreambooth(root, name, {"kind": "lora", "rank": 2, "dora": True}),
    "textual_inversion": _inversion,
}


def run(tree: dict[str, Any], folder: str = ".") -> int:
    """What `ldm train` does in a folder, in this process."""
    from ldm.config.load import dump
    from ldm.config.schema import load_run
    from ldm.recipes import assemble
    from ldm.recipes.run import run as train

    os.chdir(folder)
    torch.use_deterministic_algorithms(True)
    told = load_run(tree)
    with contextlib.redirect_stderr(io.StringIO()):
        return train(
            lambda: assemble(told.task, told.data, told.train, told.seed, told.workers),
            told.train, told.out, seed=told.seed, resolved=dump(told),
        )  # fmt: skip


def figures(root: Path, name: str, world: int) -> Figures:
    """The losses of a run and a sum over what it exports."""
    folder = f"{name.replace(', ', '-')}-{world}"
    tree = KINDS[name](root, folder) | {"name": "golden", "out": str(root / folder), "seed": 3}
    assert ranks.run(run, world, tree, timeout=600) == [0] * world
    rows = [json.loads(line) for line in (root / folder / "log" / "metrics.jsonl").read_text().splitlines()]
    return {"losses": [r["loss"] for r in rows if "loss" in r], "exported": exported(root / folder / "export")}


def exported(folder: Path) -> float:
    """The root mean square of all exported numbers, summed in float64 without rounding."""
    files = sorted(folder.rglob("*.safetensors"))
    values = [v.double().flatten() for path in files for _, v in sorted(load_file(path).items())]
    return math.sqrt(math.fsum(torch.cat(values).square().tolist()) / sum(len(v) for v in values))


def write(found: dict[str, Figures]) -> None:
    """Keep the figures."""
    made = {"torch": torch.__version__, "machine": platform.machine()}
    LOSSES.write_text(json.dumps({"made with": made, "runs": found}, indent=1) + "\n", encoding="utf-8")


def kept() -> dict[str, Figures]:
    """The figures of before, by run."""
    return json.loads(LOSSES.read_text(encoding="utf-8"))["runs"]


def differences(found: dict[str, Figures], tolerance: float = 0.0) -> list[str]:
    """A line for each figure that differs from the kept one by more than a relative `tolerance`."""
    earlier = kept()
    odd = [f"{name}: no such run any more" for name in earlier if name.rpartition(",")[0] not in KINDS]
    for name, figures in found.items():
        before = earlier.get(name, {"losses": [], "exported": 0.0})
        now, then = [*figures["losses"], figures["exported"]], [*before["losses"], before["exported"]]
        same = len(now) == len(then) and all(
            math.isclose(a, b, rel_tol=tolerance, abs_tol=0.0) for a, b in zip(now, then, strict=True)
        )
        odd += [] if same else [f"{name}: {now} for {then}"]
    return odd


def keep(root: Path) -> None:
    """A run that can go on, and the exports of others, as this version writes them."""
    shutil.rmtree(MADE, ignore_errors=True)
    for name in ("data", "autoencoder", "towers", "teacher"):  # what the run and the adapters depend on
        shutil.copytree(root / name, MADE / name)
    for name in ("text_to_image", "lcm, lora", "finetune, lora", "textual_inversion", "autoencoder", "clip"):
        folder = "run-" + name.replace(", ", "-")
        tree = KINDS[name](Path(), folder) | {"name": "golden", "out": folder, "seed": 3}
        tree["train"] |= {"checkpoint": {"every": 2, "keep": 1}}
        assert ranks.run(run, 1, tree, str(root), timeout=600) == [0]  # what is written names files relative to it
        shutil.copytree(root / folder / "export", MADE / folder / "export")
        if name == "text_to_image":
            for part in ("checkpoints", "config.yaml"):
                source = root / folder / part
                (shutil.copytree if source.is_dir() else shutil.copy)(source, MADE / folder / part)
