"""Partners against their picture: the same part of it, the same order for any ranks and workers, named where wrong."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.config.load import decode
from ldm.data.loader import DataConfig, Loader
from ldm.data.mixture import MixtureConfig, Source, open_data
from ldm.types import Batch
from tests.unit.data.paired import hole, noise, write_set


def config(path: Path, pairs: dict[str, Any], **more: Any) -> DataConfig:
    return decode(DataConfig, {"path": str(path), "size": 8, "pairs": pairs, **more}, "data")


def batches(config: DataConfig, count: int, **more: Any) -> list[Batch]:
    loader = Loader(config, **({"seed": 3, "micro_batch": 4} | more))
    return list(itertools.islice(loader.batches(), count))


def same_pictures(folder: Path, count: int = 10, **sizes: int) -> Path:
    """A set whose condition is the picture itself."""
    pictures = [noise(i, **sizes) for i in range(count)]
    return write_set(folder, [{"png": p, "condition.png": p} for p in pictures])


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_a_partner_gets_the_crop_and_flip_of_its_picture(tmp_path: Path, fit: str) -> None:
    told = config(same_pictures(tmp_path / "set"), {"condition": {"kind": "stored"}}, crop="random", flip=True, fit=fit)
    flipped = set()
    for batch in batches(told, 6):
        assert batch["condition"].dtype == torch.float32
        torch.testing.assert_close(batch["condition"], (batch["image"] + 1) / 2, rtol=0, atol=1e-6)
        flipped |= {tuple(c.tolist()) for c in batch["crop_top_left"]}
    assert fit != "crop" or len(flipped) > 2  # crops differ


def test_a_partner_of_another_scale_shows_the_same_part(tmp_path: Path) -> None:
    """The picture is a ramp; its condition is the same ramp at half the scale, also as a JPEG decoded reduced."""
    ramp = np.tile(np.linspace(0, 255, 96, dtype=np.uint8)[None, :, None], (64, 1, 3))
    half = np.asarray(Image.fromarray(ramp).resize((48, 32), Image.Resampling.BOX))
    folder = write_set(tmp_path / "set", [{"png": ramp, "condition.png": half}] * 4)
    for batch in batches(config(folder, {"condition": {"kind": "stored"}}, crop="random", flip=True, size=16), 3):
        difference = (batch["condition"] * 255 - (batch["image"] + 1) * 127.5).abs()
        assert difference.max() < 4, "half a pixel of the ramp at 16 px is 5 levels"


def test_masks_and_maps_of_classes_keep_their_values(tmp_path: Path) -> None:
    """Nearest gives no values in between; the mask's box lies where the painted box of the picture lies."""
    picture = np.zeros((24, 32, 3), np.uint8)
    mask = hole(24, 32)
    picture[mask > 0] = 255
    classes = np.where(mask[:, :, None] > 0, 7, 200).astype(np.uint8).repeat(3, 2)
    folder = write_set(tmp_path / "set", [{"png": picture, "mask.png": mask, "condition.png": classes}] * 4)
    pairs = {"inpaint_mask": {"kind": "stored_mask"}, "condition": {"kind": "stored", "filter": "nearest"}}
    for batch in batches(config(folder, pairs, size=12, crop="random", flip=True), 3):
        mask_there = batch["inpaint_mask"]
        assert mask_there.shape == (4, 1, 12, 12)
        assert set(mask_there.unique().tolist()) <= {0.0, 1.0}
        assert set((batch["condition"] * 255).round().unique().tolist()) <= {7.0, 200.0}
        painted = ((batch["image"] + 1) / 2).mean(1, keepdim=True)
        assert (painted - mask_there).abs().mean() < 0.06  # but for the resized edge


def test_what_is_made_of_the_picture(tmp_path: Path) -> None:
    folder = same_pictures(tmp_path / "set", height=8, width=8)
    pairs = {
        "grey": {"kind": "grey", "channels": 1},
        "small": {"kind": "small", "factor": 2},
        "tile": {"kind": "small", "factor": 2, "enlarge": True},
        "soft": {"kind": "blur", "sigma": 1.0},
        "inpaint_mask": {"kind": "random_mask"},
        "masked": {"kind": "masked"},
    }
    batch = batches(config(folder, pairs), 1)[0]
    image = (batch["image"] + 1) / 2
    luma = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(batch["grey"], luma, rtol=0, atol=1.5 / 255)
    levels = (image * 255).round()
    for row, small in zip(levels, batch["small"], strict=True):  # Pillow's bicubic, which clips before it rounds
        planes = [np.asarray(Image.fromarray(p.numpy()).resize((4, 4), Image.Resampling.BICUBIC)) for p in row]
        torch.testing.assert_close(small * 255, torch.tensor(np.stack(planes)).clamp(0, 255), rtol=0, atol=1.0)
    assert batch["tile"].shape == (4, 3, 8, 8)
    torch.testing.assert_close(batch["soft"] * 255, gaussian(levels, 1.0), rtol=0, atol=0.51)
    mask = batch["inpaint_mask"]
    torch.testing.assert_close(batch["masked"] * 2 - 1, batch["image"] * (1 - mask), rtol=0, atol=1e-6)


def gaussian(levels: Tensor, sigma: float) -> Tensor:
    """Pixel by pixel in float64, borders mirrored."""
    size, reach = levels.shape[-1], int(4 * sigma + 0.5)
    weights = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for d in range(-reach, reach + 1):
            j = abs(i + d)
            weights[i, j if j < size else 2 * (size - 1) - j] += np.exp(-d * d / (2 * sigma * sigma))
    weights /= weights.sum(1, keepdim=True)
    return (weights @ levels.double() @ weights.T).float()


PAIRS = {"condition": {"kind": "stored"}, "edges": {"kind": "canny"}, "inpaint_mask": {"kind": "random_mask"}}


def whole(told: DataConfig, steps: int, world: int, accumulate: int, workers: int, start: int = 0) -> dict[str, Any]:
    """All ranks' batches joined: by position each sample's key and tensors."""
    found: dict[int, Any] = {}
    for rank in range(world):
        loader = Loader(
            told, seed=5, micro_batch=4 // world // accumulate, accumulate=accumulate, rank=rank, world=world,
            workers=workers,
        )  # fmt: skip
        for batch in itertools.islice(loader.batches(start), (steps - start) * accumulate):
            for i, place in enumerate(batch["position"].tolist()):
                found[place] = (batch["key"][i], *(batch[n][i] for n in ("image", *PAIRS)))
    return {str(k): found[k] for k in sorted(found)}


@pytest.mark.parametrize("division", [(2, 1, 0), (1, 2, 3), (4, 1, 1)])
def test_ranks_workers_and_resuming_change_nothing(tmp_path: Path, division: tuple[int, int, int]) -> None:
    told = config(same_pictures(tmp_path / "set"), PAIRS, crop="random", flip=True)
    one = whole(told, 6, 1, 1, 0)
    other = whole(told, 6, *division)
    resumed = whole(told, 6, *division, start=4)
    assert one.keys() == other.keys()
    assert len({one[k][3].numpy().tobytes() for k in one}) > 12, "masks differ between samples and epochs"
    for place, row in [*other.items(), *resumed.items()]:
        assert row[0] == one[place][0]
        for mine, theirs in zip(row[1:], one[place][1:], strict=True):
            assert torch.equal(mine, theirs)


def test_memory_bounds_partners_too(tmp_path: Path) -> None:
    told = config(same_pictures(tmp_path / "set"), {"condition": {"kind": "stored"}}, memory=1500)
    loader = Loader(told, seed=0, micro_batch=4)
    list(itertools.islice(loader.batches(), 6))
    assert 0 < loader.kept_bytes <= 1500


def test_sources_of_a_mixture_with_pairs(tmp_path: Path) -> None:
    pairs = {"condition": {"kind": "stored"}}
    a, b = (config(same_pictures(tmp_path / n), pairs) for n in "ab")
    loader = open_data(MixtureConfig(sources=(Source(data=a), Source(data=b, share=3))), seed=0, micro_batch=4)
    batch = next(loader.batches())
    torch.testing.assert_close(batch["condition"], (batch["image"] + 1) / 2, rtol=0, atol=1e-6)
    plain = config(tmp_path / "b", {})
    loader = open_data(MixtureConfig(sources=(Source(data=a), Source(data=plain))), seed=0, micro_batch=4)
    with pytest.raises(ValueError, match=r"only one of them has \['condition'\]"):
        next(loader.batches())


@pytest.mark.parametrize(
    ("members", "line"),
    [
        ({}, r"no member condition.png, or of another picture's suffix; has \['png'\]"),
        (
            {"condition.png": noise(1, 12, 12)},
            "condition.png is 12x12, its picture 16x12; both must show the same part",
        ),
        ({"condition.png": b"broken"}, "condition.png: 6 bytes are no known picture format"),
    ],
)
def test_a_bad_partner_is_replaced_and_listed(tmp_path: Path, members: dict[str, Any], line: str) -> None:
    good = [{"png": noise(i), "condition.png": noise(i)} for i in range(9)]
    folder = write_set(tmp_path / "set", [*good, {"png": noise(9), **members}])
    quarantine = tmp_path / "bad.jsonl"
    told = config(folder, {"condition": {"kind": "stored"}}, quarantine=str(quarantine))
    seen = [key for batch in batches(told, 5) for key in batch["key"]]
    assert len(seen) == 20
    assert "s00009" not in seen
    reason = {"no member": "no_partner", "condition.png is": "partner_size"}.get(" ".join(line.split()[:2]), "unknown")
    assert reason in quarantine.read_text()
    bad = write_set(tmp_path / "all", [{"png": noise(9), **members}] * 8)
    with pytest.raises(ValueError, match=line):
        batches(config(bad, {"condition": {"kind": "stored"}}), 1)


@pytest.mark.parametrize(("value", "line"), [(0, "black: nothing would be painted"), (255, "white: all would be")])
def test_a_flat_mask_is_named(tmp_path: Path, value: int, line: str) -> None:
    sample = {"png": noise(0), "mask.png": np.full((12, 16), value, np.uint8)}
    folder = write_set(tmp_path / "set", [sample] * 6)
    with pytest.raises(ValueError, match=f"flat_mask.*the last: mask.png is all {line}"):
        batches(config(folder, {"inpaint_mask": {"kind": "stored_mask"}}), 1)


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        ({"source": {"kind": "stored"}}, "'source' is something else in a batch; call it original"),
        ({"mask": {"kind": "stored_mask"}}, "'mask' is something else in a batch; call it inpaint_mask"),
        ({"Condition": {"kind": "canny"}}, "'Condition' is no name; expected small letters"),
        ({"condition": {"kind": "cany"}}, "data.pairs.condition.kind: 'cany' is not one of"),
        ({"condition": {"kind": "canny", "low": 300}}, "low 300.0 must be in \\[0, high\\], high is 200"),
        ({"condition": {"kind": "canny", "high": 3000}}, "high 3000.0 is above 2040"),
        ({"masked": {"kind": "masked"}}, "pairs.masked.mask: 'inpaint_mask' is no mask among the pairs; masks are"),
        ({"small": {"kind": "small", "factor": 1}}, "factor must be at least 2, got 1"),
        ({"soft": {"kind": "blur", "sigma": 0}}, "sigma must be in"),
        ({"m": {"kind": "random_mask", "half": -1}}, "half must not be negative, got -1"),
        (
            {"m": dict.fromkeys(("rectangles", "strokes", "half", "whole"), 0) | {"kind": "random_mask"}},
            "must be above 0",
        ),
    ],
)
def test_configs_that_cannot_be(pairs: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        config(Path("emoji"), pairs)


def test_a_factor_that_does_not_divide_is_named(tmp_path: Path) -> None:
    told = config(same_pictures(tmp_path / "set"), {"small": {"kind": "small", "factor": 3}})
    with pytest.raises(ValueError, match=r"pairs.small.factor: 3 does not divide pictures of 8x8 pixels"):
        batches(told, 1)


def test_without_pairs_a_batch_is_as_before(tmp_path: Path) -> None:
    """Also over a set that has partners: their members are neither read nor mistaken for pictures."""
    folder = same_pictures(tmp_path / "set")
    plain = write_set(tmp_path / "plain", [{"png": noise(i)} for i in range(10)])
    for mine, theirs in zip(batches(config(folder, {}), 3), batches(config(plain, {}), 3), strict=True):
        assert mine.keys() == theirs.keys()
        assert torch.equal(mine["image"], theirs["image"])
