"""The engine at every ZeRO stage, on one and two ranks, against plain PyTorch; its checkpoints at every other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.train.state import read_weights
from tests import ranks
from tests.distributed import tiny, work

STAGES = (0, 1, 2, 3)
PLACES = list(itertools.product((1, 2), STAGES))
Story = dict[str, Any]


@pytest.fixture(scope="module")
def oracle() -> tiny.Plain:
    return tiny.plain(work.HALF + 2)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], tuple[Story, Path]]:
    """The story of (world, stage), told once."""
    told: dict[tuple[int, int], tuple[Story, Path]] = {}

    def tell(world: int, stage: int) -> tuple[Story, Path]:
        if (world, stage) not in told:
            folder = tmp_path_factory.mktemp(f"world-{world}-stage-{stage}")
            results = ranks.run(work.story, world, stage, str(folder))
            for other in results[1:]:
                assert other["losses"] == results[0]["losses"]
                assert tiny.worst(other["end"], results[0]["end"]) == 0
            told[world, stage] = results[0], folder / f"step-{work.HALF}"
        return told[world, stage]

    return tell


@pytest.mark.parametrize(("world", "stage"), PLACES)
def test_training_equals_plain_pytorch(stories: Any, oracle: tiny.Plain, world: int, stage: int) -> None:
    story, _ = stories(world, stage)
    assert story["losses"] == pytest.approx(oracle.losses, rel=1e-5)
    assert story["norms"] == pytest.approx(oracle.norms[: work.HALF], rel=1e-5)
    assert min(oracle.norms) > tiny.CLIP  # every step was clipped
    # moments show the clipped gradient itself, which Adam's step (blind to its scale) does not
    assert tiny.worst(story["first"], oracle.first[work.HALF - 1]) < 1e-4
    assert tiny.worst(story["second"], oracle.second[work.HALF - 1]) < 1e-4
    assert tiny.worst(story["weights"][-1], oracle.weights[work.HALF - 1]) < 1e-4
    assert tiny.worst(story["full"], story["weights"][-1]) == 0


@pytest.mark.parametrize(("world", "stage"), PLACES)
def test_ema_is_the_closed_form_over_the_trajectory(stories: Any, world: int, stage: int) -> None:
    story, _ = stories(world, stage)
    trajectory = [story["start"], *story["weights"]]
    decays = [min(tiny.EMA.decay, (1 + n) / (10 + n)) for n in range(work.HALF)]
    expected = {}
    for name in story["start"]:  # sum over k of (1 - d_k) d_{k+1} ... d_n w_k, and d_1 ... d_n w_0, in float64
        total = torch.zeros_like(trajectory[0][name], dtype=torch.float64)
        for k, weights in enumerate(trajectory):
            share = 1.0 if k == 0 else 1 - decays[k - 1]
            for d in decays[k:]:
                share *= d
            total += share * weights[name].double()
        expected[name] = total
    assert tiny.worst(story["ema"], expected) < 1e-6


@pytest.mark.parametrize(("world", "stage"), PLACES)
def test_applied_swaps_and_restores_exactly(stories: Any, world: int, stage: int) -> None:
    swap = stories(world, stage)[0]["swap"]
    before, inside, after = swap["losses"]
    assert swap["same"]
    assert before == after
    assert tiny.worst(swap["weights"], stories(world, stage)[0]["ema"]) == 0
    objective = tiny.build()
    objective.load_state_dict(stories(world, stage)[0]["ema"])
    batch = tiny.rows(8, list(range(tiny.BATCH)))
    with torch.no_grad():
        loss, _ = objective(batch, work.Rng.of(tiny.SEED, batch["position"]))
    assert inside == pytest.approx(float(loss), rel=1e-5)
    assert abs(inside - before) > 1e-4 * before


@pytest.mark.parametrize(("world", "stage"), PLACES)
def test_resume_is_bit_exact(stories: Any, world: int, stage: int) -> None:
    story, folder = stories(world, stage)
    assert story["loaded"] == (work.HALF, 7)
    assert tiny.worst(story["other"], story["full"]) > 0.01  # the second engine began elsewhere
    assert story["again"] == story["losses"][work.HALF :]
    assert tiny.worst(story["again end"], story["end"]) == 0
    assert tiny.worst(story["again ema"], story["end ema"]) == 0
    assert tiny.worst(read_weights(folder), story["ema"]) == 0
    assert tiny.worst(read_weights(folder, "w"), story["full"]) == 0


@pytest.mark.parametrize("world", [1, 2])
def test_any_world_size_and_stage_reads_the_checkpoint_of_any_other(
    stories: Any, oracle: tiny.Plain, world: int
) -> None:
    by_folder = {str(folder): story for story, folder in itertools.starmap(stories, PLACES)}
    for found in ranks.run(work.load_each, world, list(by_folder))[-1]:
        story = by_folder[found["folder"]]
        for key, value in (("weights", story["full"]), ("first", story["first"]), ("second", story["second"])):
            assert tiny.worst(found[key], value) == 0, (key, found["stage"], found["folder"])
        assert tiny.worst(found["ema"], story["ema"]) == 0
        if "losses" in found:
            assert found["losses"] == pytest.approx(oracle.losses[work.HALF :], rel=1e-5)


@pytest.mark.parametrize(("world", "stage"), [(2, 0), (2, 1), (2, 2), (1, 3), (2, 3)])
def test_accumulation_is_the_same_global_batch(oracle: tiny.Plain, world: int, stage: int) -> None:
    found = ranks.run(work.train, world, stage, 3, 2)[0]
    assert found["losses"] == pytest.approx(oracle.losses[:3], rel=1e-5)
    assert found["norms"] == pytest.approx(oracle.norms[:3], rel=1e-5)
    assert tiny.worst(found["first"], oracle.first[2]) < 1e-4


@pytest.mark.parametrize("stage", [0, 2])
def test_clip_zero_is_off(stage: int) -> None:
    expected = tiny.plain(2, clip=0)
    found = ranks.run(work.train, 1, stage, 2, 1, 0.0)[0]
    assert tiny.worst(found["first"], expected.first[1]) < 1e-4


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 2)])
def test_bf16_computes_in_half_and_keeps_float32(oracle: tiny.Plain, world: int, stage: int) -> None:
    found = ranks.run(work.train_in_bf16, world, stage, 3)[0]
    assert found["dtypes"] == {torch.float32}
    assert found["losses"] == pytest.approx(oracle.losses[:3], rel=2e-2)
    assert found["losses"] != pytest.approx(oracle.losses[:3], rel=1e-6)  # it is another arithmetic


@pytest.mark.parametrize("stage", STAGES)
def test_nan_on_one_rank_updates_nothing_anywhere(oracle: tiny.Plain, stage: int) -> None:
    """In the first of two micro-batches on the second of two ranks: the step leaves no trace, the next is exact."""
    for found in ranks.run(work.skip, 2, stage, 2):
        assert not found["updated"]
        assert tiny.worst(found["after"], found["before"]) == 0
        assert found["losses"] == pytest.approx(oracle.losses[:2], rel=1e-5)
        assert tiny.worst(found["first"], oracle.first[1]) < 1e-4
