"""What is kept for later is kept under what decides it: which samples, which weights, how texts become states."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.data.indexing import index
from ldm.evaluate import sampler_table, statistics
from ldm.evaluate.measure import real_pictures
from ldm.metrics.features import Encoder
from ldm.models.text import TextConfig, TextTower
from ldm.recipes.sources import cache_hashes, text_settings, weights_hash
from tests.unit.data.pictures import color_of, png
from tests.unit.data.tarred import Member, pack


def scored(folder: Path) -> Path:
    members: list[Member] = []
    for i in range(12):
        record = json.dumps({"caption": f"picture {i}", "score": i}).encode()
        members += [(f"{i:03d}.png", png(color_of(20 * i))), (f"{i:03d}.json", record)]
    pack(folder / "0.tar", members)
    return folder


def flat(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :8]


def test_kept_features_are_of_the_samples_that_a_filter_kept(tmp_path: Path) -> None:
    """The tar is the same, and so are the numbers of the samples."""
    data, ids = str(scored(tmp_path / "set")), (0, 2, 5)
    network = Encoder("flat", flat)
    for where in ("score < 6", "score >= 6", "score < 6"):
        index(Path(data), where=where)
        kept = statistics.real_features(network, data, "train", ids, 8, tmp_path / "kept")
        real = flat(real_pictures(data, "train", list(ids), 8)).double()
        assert torch.equal(kept, real)
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_rows_of_a_table_say_which_samples_they_are_of(tmp_path: Path) -> None:
    data = scored(tmp_path / "set")
    told = []
    for where in ("score < 6", "score >= 6", "score <= 5"):
        index(data, where=where)
        told.append({"data": "set", "samples": statistics.samples_of(str(data), "train")})
    sampler_table.same(Path("row.json"), told[0], told[2])
    with pytest.raises(ValueError, match=r"row\.json: measured with samples '\w+', now '\w+'; give another --out"):
        sampler_table.same(Path("row.json"), told[0], told[1])
    sampler_table.same(Path("row.json"), {"data": "set"}, told[1])  # of a version that did not say


def test_texts_are_told_apart_by_more_than_weights() -> None:
    """Padding and the layer change the states of the same weights: SD 1.x and SD 2.x differ in both."""
    config = TextConfig(width=16, heads=2, layers=2, context_length=12, vocab_size=4096, bpe="emoji")
    torch.manual_seed(0)
    tower = TextTower(config)
    others = {
        "pad": replace(config, pad="zero"),
        "output": replace(config, output="penultimate"),
        "activation": replace(config, activation="gelu"),
        "heads": replace(config, heads=4),
    }
    mine = tower.encode(tower.tokenize(["a red apple"]))["text"]
    for name, other in others.items():
        changed = TextTower(other)
        changed.model.load_state_dict(tower.model.state_dict())
        states = changed.encode(changed.tokenize(["a red apple"]))["text"]
        assert weights_hash(changed) == weights_hash(tower)
        assert not torch.allclose(states, mine), name
        assert text_settings([changed]) != text_settings([tower]), name
    assert cache_hashes(towers=[tower]) == cache_hashes(towers=[tower])
    assert set(cache_hashes(towers=[tower])) == {"text", "text_settings"}
    assert cache_hashes() == {}
