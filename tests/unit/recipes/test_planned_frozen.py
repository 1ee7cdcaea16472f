"""Frozen parts in a plan: bytes are those that stored modules hold, and peaks those of real ranks under DeepSpeed."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm.checkpoint.convert import save_diffusers
from ldm.config.schema import load_run
from ldm.models import networks
from ldm.models.frozen import Storage, held_bytes, of_autoencoder, store
from ldm.plan.hardware import find
from ldm.plan.memory import memory, resting
from ldm.plan.report import Planner
from ldm.plan.throughput import Cluster
from ldm.recipes import plan_job, planned_frozen
from ldm.recipes.planned import Asked
from ldm.train.engine_config import EngineConfig
from tests import miniature, ranks
from tests.families import make, network_config, scrambled
from tests.unit.plan import work

STORAGES: tuple[Storage, ...] = ("fp32", "bf16", "int8", "nf4")
SIDE, MICRO = 32, 4
WIDE = {"num_attention_heads": 4, "attention_head_dim": 32, "caption_projection_dim": 128, "sample_size": 16,
        "pos_embed_max_size": 16, "num_layers": 4}  # fmt: skip


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", ["sd3", "flux", "pixart", "zimage"])
def test_planned_bytes_are_those_that_are_held(kind: str, storage: Storage, tmp_path: Path) -> None:
    """Of a network, its blocks, the autoencoder and the text encoders."""
    parts = make(kind, tmp_path / "tokenizers")
    network = networks.build(network_config(kind)).requires_grad_(False)
    planned = planned_frozen.network(copy.deepcopy(network).to("meta"), EngineConfig(frozen=storage))
    store(network, storage)
    assert planned.total == held_bytes(network)
    blocks = sum(held_bytes(block) for _, block in network.blocks())
    assert planned.exact == blocks
    vae = copy.deepcopy(parts.autoencoder).to("meta")
    store(parts.autoencoder.requires_grad_(False), of_autoencoder(storage))
    assert planned_frozen.autoencoder(vae, storage) == held_bytes(parts.autoencoder)
    for encoder in parts.text:
        bare = copy.deepcopy(encoder).to("meta")
        store(encoder.requires_grad_(False), storage)
        whole = 4 * sum(p.numel() for p in encoder.parameters())
        assert planned_frozen.text(bare, storage, "fp32") == (whole if storage == "fp32" else held_bytes(encoder))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    miniature.data(folder / "data")
    parts = make("sd3", folder / "tokenizers")
    network: Any = scrambled(networks.build(replace(network_config("sd3"), **WIDE)))
    save_diffusers(
        folder / "sd3", network=network, autoencoder=parts.autoencoder, text=parts.text, scheduler=parts.scheduler
    )
    return folder


def config(root: Path, storage: str, recompute: bool) -> Path:
    tree = miniature.text_to_image(root)
    tree["task"] = {"kind": "finetune", "base": str(root / "sd3"), "adapter": {"kind": "lora", "rank": 4},
                    "gradient_checkpointing": recompute, "cache": str(root / f"cache-{storage}")}  # fmt: skip
    tree["data"] = {"path": str(root / "data"), "size": SIDE}
    tree["train"]["batch"] = MICRO
    tree["train"]["engine"] = {"zero_stage": 1, "precision": "fp32", "bucket": work.BUCKET, "frozen": storage}
    return miniature.write(tree, root / f"{storage}-{recompute}.yaml")


@pytest.mark.parametrize(
    ("storage", "recompute"),
    [
        pytest.param(storage, again, marks=[pytest.mark.slow] * ((storage, again) != ("int8", False)))
        for storage in STORAGES
        for again in (False, True)
    ],
)
def test_planned_memory_is_that_of_a_real_run(root: Path, storage: str, recompute: bool) -> None:
    """A LoRA over stored weights: every allocation counted, what is made whole for a layer's time too."""
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    path = config(root, storage, recompute)
    run = load_run(path)
    job = plan_job(run.task, run.data, run.train, Asked(name=run.name, world=1, gpu=False))
    planner = Planner(job, Cluster(nodes=1, per_node=1, hardware=find("cpu")), recomputing=(recompute,))
    found = memory(planner.sizes, planner.activations[recompute], MICRO, job.layout, planner.frozen_bytes).total
    rest = resting(planner.sizes, job.layout, planner.frozen_bytes)
    ((real_rest, real),) = ranks.run(work.measured_task, 1, str(path), MICRO, timeout=900)
    print(
        f"{storage}{' recompute' * recompute}: {found / 1e6:.2f} MB for {real / 1e6:.2f}, {found / real - 1:+.1%}; "
        f"at rest {rest / 1e6:.2f} for {real_rest / 1e6:.2f}, {rest / real_rest - 1:+.1%}"
    )
    assert found == pytest.approx(real, rel=0.1)
    assert rest == pytest.approx(real_rest, rel=0.1)
