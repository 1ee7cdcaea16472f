"""Class pictures on two ranks: each draws its share, with noise that is the picture's own, and none draws twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm import dist
from ldm.pipeline import Settings
from ldm.recipes import prior
from ldm.recipes.prior import Prior
from ldm.rng import Rng
from tests import ranks


class Noise:
    """Draws the start noise itself."""

    def __init__(self) -> None:
        self.drawn: list[int] = []

    def sample(self, prompts: list[str], *, settings: Settings, indices: list[int]) -> Tensor:
        self.drawn += indices
        return Rng(settings.seed, tuple(indices)).normal("start", (3, 8, 8)).clamp(-1, 1)


def make(folder: Path, count: int, prompt: str = "a dog") -> list[int]:
    """Numbers of the pictures that this rank drew."""
    pipeline = Noise()
    prior.make(Prior(count=count, settings=Settings(batch=2, seed=4)), prompt, folder, "base", pipeline)  # type: ignore[arg-type]
    assert dist.world_size() == int(torch.distributed.get_world_size())
    return pipeline.drawn


def refused(folder: Path) -> str:
    with pytest.raises(ValueError, match=r"class pictures of other prompt|rank 0 tells why") as error:
        make(folder, 7, "a cat")
    return str(error.value)


def test_ranks_share_the_pictures(tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    shares = ranks.run(make, 2, two, 7)
    assert shares == [[0, 2, 4, 6], [1, 3, 5]]
    assert ranks.run(make, 1, one, 7) == [list(range(7))]
    pictures = {p.name: p.read_bytes() for p in two.glob("*.png")}
    assert len(pictures) == len(set(pictures.values())) == 7
    assert pictures == {p.name: p.read_bytes() for p in one.glob("*.png")}
    assert ranks.run(make, 2, two, 7) == [[], []]  # used again
    (two / "class-00003.png").unlink()
    assert ranks.run(make, 2, two, 9) == [[3, 8], [7]]
    assert {p.name for p in two.iterdir()} == {f"class-{i:05d}.png" for i in range(9)} | {"class.json"}


def test_another_prompt_is_refused_on_all_ranks(tmp_path: Path) -> None:
    ranks.run(make, 2, tmp_path, 2)
    assert len(ranks.run(refused, 2, tmp_path)) == 2
