"""The data path under real ranks and ZeRO 2: one, two, three and four train on the same samples to the same losses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from ldm import dist
from ldm.config.load import decode
from ldm.data.manifest import Manifest
from ldm.data.mixture import Data, MixtureConfig, open_data
from ldm.data.write import ShardWriter
from ldm.rng import Rng
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig
from ldm.train.optim import Optim
from tests import ranks
from tests.distributed import tiny
from tests.unit.data.pictures import color_of, png

OPTIM = Optim(lr=3e-3, eps=1e-6, weight_decay=0.0)
BATCH, STEPS, STARTS = 12, 2, (0, 10_000_000)


def make(folder: Path, count: int, bad: tuple[int, ...] = ()) -> None:
    """Pictures of 6 x 5 in shards of unequal numbers, two captions and a condition each; some cannot be decoded."""
    shards = []
    for number, (first, last) in enumerate(itertools.pairwise((0, 3, 17, count))):
        with ShardWriter(folder, f"part{number}") as writer:
            for i in range(first, last):
                record = json.dumps({"captions": [[f"{folder.name} {i}", 2], f"other {i}"]}).encode()
                data = b"broken" if i in bad else png(color_of(i), (6, 5))
                beside = {"condition.png": png(color_of(i + 1), (6, 5))}
                writer.add(f"{folder.name}{i:03d}", {"png": data, **beside, "json": record})
        shards += writer.shards
    Manifest(name=folder.name, shards=tuple(shards), folder=folder).write()


def config(root: str) -> Data:
    """Pictures with random crops, flips and masks, mixed two to one with a smaller set of half the weight."""
    pairs = {"condition": {"kind": "stored"}, "inpaint_mask": {"kind": "random_mask", "half": 1, "rectangles": 1}}
    source = {"size": 4, "crop": "random", "flip": True, "max_bad": 0.5, "pairs": pairs}
    one = {"data": {"path": f"{root}/a", **source}, "share": 2, "weight": 1.0}
    two = {"data": {"path": f"{root}/b", "template": "sks {}", **source}, "weight": 0.5}
    return decode(MixtureConfig, {"kind": "mixture", "sources": [one, two]})


def train(root: str, accumulate: int, workers: int) -> dict[str, Any]:
    """Rows and losses of two optimizer steps from the data's step 0 on, and two more from step 10 million on."""
    world = dist.world_size()
    loader = open_data(
        config(root),
        seed=3,
        micro_batch=BATCH // world // accumulate,
        accumulate=accumulate,
        rank=dist.rank(),
        world=world,
        workers=workers,
    )
    objective = tiny.build()
    settings = EngineConfig(zero_stage=2, precision="fp32", clip=0.0)
    micro = BATCH // world // accumulate
    engine = Engine(objective, OPTIM.build(objective.parameters()), settings, micro_batch=micro, accumulate=accumulate)
    engine.set_lr(OPTIM.lr)
    losses, rows = [], []
    streams = [loader.batches(start) for start in STARTS]
    for stream in [s for s in streams for _ in range(STEPS)]:
        total = 0.0
        for _ in range(accumulate):
            batch = next(stream)
            loss, _ = engine.forward(batch, Rng.of(3, batch["position"]))
            engine.backward_step(loss)
            total += float(dist.mean(loss)) / accumulate
            beside = [batch[name].flatten(1).mean(1).tolist() for name in ("condition", "inpaint_mask")]
            rows += list(zip(batch["position"].tolist(), batch["key"], batch["caption"], *beside, strict=True))
        losses.append(total)
    return {"losses": losses, "rows": rows}


def test_one_to_four_ranks_see_the_same_and_lose_the_same(tmp_path: Path) -> None:
    for name, count, bad in (("a", 31, (5, 20)), ("b", 19, ())):
        make(tmp_path / name, count, bad)
    whole = ranks.run(train, 1, str(tmp_path), 1, 0)[0]
    wanted = [p for start in STARTS for p in range(start * BATCH, (start + STEPS) * BATCH)]
    assert [r[0] for r in whole["rows"]] == wanted
    assert {"a005", "a020"}.isdisjoint(r[1] for r in whole["rows"])
    assert len(set(whole["losses"])) == STEPS * len(STARTS)
    assert len({r[4] for r in whole["rows"]}) > 4  # masks differ
    for world, accumulate, workers in ((2, 3, 1), (3, 2, 0), (4, 1, 2)):
        parts = ranks.run(train, world, str(tmp_path), accumulate, workers, timeout=500)
        rows = sorted(tuple(r) for part in parts for r in part["rows"])
        assert rows == [tuple(r) for r in whole["rows"]]
        for part in parts:
            assert part["losses"] == pytest.approx(whole["losses"], rel=2e-5)
