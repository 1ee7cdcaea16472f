"""CMMD and diversity against closed forms and NumPy; the table of prompts; features of real pictures kept."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.cli.__main__ import main
from ldm.evaluate import statistics
from ldm.evaluate.measure import clip_features
from ldm.evaluate.prompts import by_prompt
from ldm.metrics.cmmd import cmmd
from ldm.metrics.diversity import diversity
from ldm.metrics.features import Encoder
from ldm.recipes.sources import load_clip
from tests import miniature


def test_cmmd_of_single_points_is_the_closed_form() -> None:
    """Orthogonal unit vectors are sqrt(2) apart: 1000 (2 - 2 exp(-2 / 2 sigma^2)), whatever their lengths."""
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    assert cmmd(a, b) == pytest.approx(1000 * (2 - 2 * math.exp(-0.01)), rel=1e-12)
    assert cmmd(a, b, sigma=1.0) == pytest.approx(1000 * (2 - 2 * math.exp(-1.0)), rel=1e-12)
    assert cmmd(a, 7 * a) == pytest.approx(0, abs=1e-9)


def test_cmmd_is_the_double_sum_in_numpy() -> None:
    g = np.random.default_rng(0)
    x, y = g.normal(size=(37, 6)), g.normal(size=(23, 6)) + 0.4
    u, v = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))

    def mean(p: Any, q: Any) -> float:
        return float(np.mean([[np.exp(-((i - j) ** 2).sum() / 200) for j in q] for i in p]))

    want = 1000 * (mean(u, u) + mean(v, v) - 2 * mean(u, v))
    assert cmmd(torch.tensor(x), torch.tensor(y), part=10) == pytest.approx(want, rel=1e-6)
    with pytest.raises(ValueError, match="widths differ"):
        cmmd(torch.zeros(2, 3), torch.zeros(2, 4))


def test_diversity_is_the_mean_over_pairs() -> None:
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))

    def maps(x: Tensor) -> list[Tensor]:
        return [x, x[:, :2, ::2, ::2] * 3]

    total, count = 0.0, 0
    for i in range(4):
        for j in range(i):
            terms = []
            for m in maps(images.double()):
                p, q = (m[k] / (m[k].square().sum(0, keepdim=True) + 1e-8).sqrt() for k in (i, j))
                terms.append(float((p - q).square().sum(0).mean()))
            total, count = total + sum(terms) / len(terms), count + 1
    assert diversity(images, maps) == pytest.approx(total / count, rel=1e-5)
    assert diversity(images[:1].repeat(3, 1, 1, 1), maps) == 0
    with pytest.raises(ValueError, match="at least 2 pictures"):
        diversity(images[:1], maps)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = miniature.project(tmp_path_factory.mktemp("prompts"))
    miniature.teacher(root)
    return root


def test_rows_belong_to_their_prompts(root: Path) -> None:
    clip, config = load_clip(str(root / "towers"))
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    prompts = ["a red dot", "a blue bar", "a green cross"]
    rows = by_prompt(images, prompts, 2, clip, config, None)
    model: Any = clip
    from ldm.models.text.openclip import tokenizer_of

    texts = model.encode_text(tokenizer_of(config)(prompts)).double()
    seen = clip_features(images, clip, config).double()
    for i, row in enumerate(rows):
        cosines = torch.nn.functional.cosine_similarity(seen[2 * i : 2 * i + 2], texts[i : i + 1])
        assert row.clip_score == pytest.approx(float(100 * cosines.clamp(min=0).mean()), rel=1e-4, abs=1e-4)
        assert row.diversity is None
    with pytest.raises(ValueError, match="expected 2 pictures of each of 3"):
        by_prompt(images[:5], prompts, 2, clip, config, None)


def test_the_command_writes_figures_table_and_sheet_with_the_protocol(root: Path, tmp_path: Path) -> None:
    argv = ["evaluate", "prompts", "--data", str(root / "data"), "--split", "train", "--count", "3", "--each", "2"]
    argv += ["--model", str(root / "teacher"), "--clip", str(root / "towers"), "--steps", "2", "--no-diversity"]
    outs = [tmp_path / n for n in ("figures.json", "table.csv", "sheet.png")]
    assert main([*argv, "--out", str(outs[0]), "--table", str(outs[1]), "--sheet", str(outs[2])]) == 0
    told = json.loads(outs[0].read_text())
    wanted = {
        "data",
        "split",
        "count",
        "seed",
        "sampler",
        "steps",
        "guidance",
        "weights",
        "clip",
        "clip_weights",
        "each",
    }
    assert wanted <= set(told["protocol"])
    rows = list(csv.DictReader(outs[1].read_text().splitlines()))
    assert [r["prompt"] for r in rows] == [
        r["prompt"] for r in sorted(told["result"]["prompts"], key=lambda r: r["clip_score"])
    ]
    assert told["result"]["clip_score"] == pytest.approx(sum(float(r["clip_score"]) for r in rows) / 3, abs=1e-3)
    assert outs[2].is_file()


def test_real_features_are_computed_once_and_named_by_what_they_depend_on(root: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def encode(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images.flatten(1)[:, :8]

    def features(name: str, size: int, ids: tuple[int, ...], cache: Path | None) -> Tensor:
        return statistics.real_features(Encoder(name, encode), str(root / "data"), "train", ids, size, cache)

    plain = features("one", 16, (0, 3, 5), None)
    first, again = (features("one", 16, (0, 3, 5), tmp_path) for _ in range(2))
    assert torch.equal(plain, first)
    assert torch.equal(first, again)
    assert len(calls) == 2
    for name, size, ids in (("two", 16, (0, 3, 5)), ("one", 8, (0, 3, 5)), ("one", 16, (0, 3))):
        features(name, size, ids, tmp_path)
    assert len(calls) == 5
    assert len(list(tmp_path.iterdir())) == 4
