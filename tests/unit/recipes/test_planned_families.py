"""Planned memory of the transformers' runs against what real ranks allocate under DeepSpeed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm.checkpoint.convert import save_diffusers
from ldm.cli.__main__ import main
from ldm.config.load import encode
from ldm.config.schema import load_run
from ldm.models import networks
from ldm.plan.hardware import find
from ldm.plan.memory import memory, resting
from ldm.plan.report import Planner
from ldm.plan.throughput import Cluster
from ldm.recipes import plan_job
from ldm.recipes.planned import Asked
from tests import miniature, ranks
from tests.families import make, network_config, scrambled
from tests.unit.plan import work

KINDS = ("sd3", "flux", "pixart", "zimage")
SIDE, MICRO = 32, 4
WIDE: dict[str, dict[str, Any]] = {
    "sd3": {"num_attention_heads": 4, "attention_head_dim": 32, "caption_projection_dim": 128, "sample_size": 16,
            "pos_embed_max_size": 16},
    "flux": {"num_attention_heads": 4, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)},
    "pixart": {"num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128, "sample_size": 16,
               "num_layers": 4},
    "zimage": {"dim": 128, "n_heads": 4, "n_kv_heads": 4, "axes_dims": (8, 12, 12)},
}  # fmt: skip
"""Wide enough that weights and activations are most of what a step takes."""


def network(kind: str) -> Any:
    return replace(network_config(kind), **WIDE[kind])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    miniature.data(folder / "data")
    return folder


def base(root: Path, kind: str) -> str:
    """A folder of a family, made at its first use."""
    folder = root / kind
    if not folder.exists():
        parts = make(kind, root / "tokenizers" / kind)
        own: dict[str, Any] = {"network": scrambled(networks.build(network(kind))), "autoencoder": parts.autoencoder}
        save_diffusers(folder, text=parts.text, scheduler=parts.scheduler, **own)
    return str(folder)


def config(root: Path, kind: str, method: str, stage: int, recompute: bool) -> Path:
    flow = {"schedule": {"kind": "flow", "shift": 3.0}, "prediction": {"kind": "velocity"}}
    model = base(root, kind)
    tasks: dict[str, dict[str, Any]] = {
        "train": {"kind": "text_to_image", "vae": model, "text": model, "network": encode(network(kind)),
                  "process": {"variance": "learned"} if kind == "pixart" else flow},
        "lora": {"kind": "finetune", "base": model, "adapter": {"kind": "lora", "rank": 4}},
        "full": {"kind": "finetune", "base": model, "adapter": {"kind": "full"}},
        "full with text": {"kind": "finetune", "base": model, "adapter": {"kind": "full", "text": True}},
        "lcm": {"kind": "distill", "teacher": model, "guidance_embedding": None,
                "method": {"kind": "lcm", "w": [2.0, 8.0], "decay": 0.9}},
    }  # fmt: skip
    more = {"gradient_checkpointing": recompute, "cache": str(root / f"cache-{kind}-{method}")}
    tree = miniature.text_to_image(root) | {"task": tasks[method] | more}
    tree["data"] = {"path": str(root / "data"), "size": SIDE}
    tree["train"]["batch"] = MICRO
    tree["train"]["engine"] = {"zero_stage": stage, "precision": "fp32", "bucket": work.BUCKET}
    return miniature.write(tree, root / f"{kind}-{method.replace(' ', '-')}-{stage}-{recompute}.yaml")


QUICK = {("lcm", "sd3", 1, False), ("lora", "zimage", 1, True)}
METHODS = [
    ("train", 0, 1), ("train", 0, 2), ("train", 1, 2), ("train", 2, 2), ("train", 3, 2), ("lora", 1, 1), ("lora", 2, 2),
    ("full", 1, 1), ("full", 3, 2), ("full with text", 1, 1), ("lcm", 1, 1), ("lcm", 2, 2),
]  # fmt: skip
CASES = [
    pytest.param(
        method, kind, stage, world, again, marks=[pytest.mark.slow] * ((method, kind, world, again) not in QUICK)
    )
    for method, stage, world in METHODS
    for kind in KINDS
    for again in (False, True)
]


@pytest.mark.parametrize(("method", "kind", "stage", "world", "recompute"), CASES)
def test_planned_memory_is_that_of_a_real_run(
    root: Path, method: str, kind: str, stage: int, world: int, recompute: bool
) -> None:
    """Every allocation counted: model, optimizer, average, frozen encoders, the step on cached latents and text."""
    path = config(root, kind, method, stage, recompute)
    run = load_run(path, [f"train.batch={MICRO * world}"])
    job = plan_job(run.task, run.data, run.train, Asked(name=run.name, world=world, gpu=False))
    planner = Planner(job, Cluster(nodes=1, per_node=world, hardware=find("cpu")), recomputing=(recompute,))
    found = memory(planner.sizes, planner.activations[recompute], MICRO, job.layout, planner.frozen_bytes).total
    rest = resting(planner.sizes, job.layout, planner.frozen_bytes)
    for real_rest, real in ranks.run(work.measured_task, world, str(path), MICRO, timeout=900):
        print(
            f"{method} {kind} stage {stage} x {world}{' recompute' * recompute}: {found / 1e6:.1f} MB for "
            f"{real / 1e6:.1f}, {found / real - 1:+.1%}; at rest {rest / real_rest - 1:+.1%}"
        )
        assert found == pytest.approx(real, rel=0.1)
        assert rest == pytest.approx(real_rest, rel=0.1)


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("lcm", "task.drop=0.1", ""),
        ("train", "task.gradient_checkpointing=transformer", "'transformer' is not one of ['block', 'none']"),
        ("lcm", "task.method.kind=tcd", "method.kind: 'tcd', but its sampler in diffusers knows no flow"),
        (
            "lcm",
            "task.guidance_embedding=32",
            "the SD3 transformer has no place for one; write null",
        ),
        ("lora", "data.size=34", "data.size: 34 is not a multiple of 4"),
    ],
)
def test_a_plan_is_printed_or_refused_in_one_line(
    root: Path, method: str, change: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["plan", str(config(root, "sd3", method, 1, False)), change, "--gpus-per-node", "1"])
    out, err = capsys.readouterr()
    assert code == (2 if said else 0), err
    assert "trained weights" in out if not said else not out
    assert said in err
    assert err.count("\n") == (1 if said else 0), err
