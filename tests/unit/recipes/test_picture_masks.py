"""Masks of a masked loss: found by transparency, suffix and folder; cropped, flipped and cached as the picture is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config.load import decode
from ldm.config.schema import RunConfig
from ldm.recipes import assemble
from ldm.recipes.pictures import check, prepare
from tests import miniature

SIZE = miniature.SIZE


def gradient(seed: int, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Grey waves (H, W), which no flip or crop leaves as they are."""
    y, x = np.mgrid[: size[1], : size[0]]
    return (127 + 100 * np.sin(x / 3.0 + seed) * np.cos(y / 5.0) + x).clip(0, 255).astype(np.uint8)


def folder_of(root: Path, kind: str, sizes: tuple[tuple[int, int], ...] = ((24, 40), (40, 24), (32, 32))) -> Path:
    """Grey pictures whose masks are the pictures themselves; of `alpha` with their greys as opacity, on black."""
    folder = root / "own"
    folder.mkdir(exist_ok=True)
    for i, size in enumerate(sizes):
        grey = Image.fromarray(gradient(i, size))
        if kind == "alpha":
            Image.merge("RGBA", (Image.new("L", size),) * 3 + (grey,)).save(folder / f"{i}.png")
        else:
            grey.convert("RGB").save(folder / f"{i}.png")
        place = {"suffix": folder / f"{i}-masklabel.png", "beside": folder / "masks" / f"{i}.png",
                 "apart": root / "apart" / f"{i}.PNG"}.get(kind)  # fmt: skip
        if place is not None:
            place.parent.mkdir(exist_ok=True)
            grey.save(place)
        (folder / f"{i}.txt").write_text("waves")
    return folder


def where_of(root: Path, kind: str) -> str:
    return {"alpha": "alpha", "suffix": "-masklabel", "beside": "masks/", "apart": str(root / "apart")}[kind]


@pytest.mark.parametrize("kind", ["alpha", "suffix", "beside", "apart"])
def test_masks_are_found_and_are_no_pictures(tmp_path: Path, kind: str) -> None:
    found = check(folder_of(tmp_path, kind), SIZE, own=True, masks=where_of(tmp_path, kind))
    assert found.bad == ()
    assert len(found.names) == 3
    for i, mask in enumerate(found.masks):
        assert np.array_equal(np.asarray(mask), gradient(i, found.pictures[i].size))


def test_without_a_masked_loss_nothing_is_read() -> None:
    from ldm.recipes.pictures import Found

    assert Found((), (), (), ()).masks == ()


def test_a_picture_without_a_mask_is_learned_whole_and_it_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "suffix")
    (folder / "1-masklabel.png").unlink()
    found = check(folder, SIZE, own=True, masks="-masklabel")
    assert np.asarray(found.masks[1]).min() == 255
    assert "1 pictures have no mask: all of them is learned" in found.remarks


@pytest.mark.parametrize(
    ("kind", "where", "told"),
    [
        ("none", "alpha", "masks: 'alpha': none of the 3 pictures of .* has transparency"),
        ("none", "_mask", "none of the 3 pictures of .* has a mask"),
        ("none", "mask", "masks: 'mask': expected alpha, a folder of masks, a suffix"),
    ],
)
def test_no_mask_at_all_is_an_error(tmp_path: Path, kind: str, where: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check(folder_of(tmp_path, kind), SIZE, own=True, masks=where)


def test_a_mask_of_another_shape_leaves_its_picture_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "suffix")
    Image.new("L", (10, 90)).save(folder / "0-masklabel.png")
    found = check(folder, SIZE, own=True, masks="-masklabel")
    assert [b["reason"] for b in found.bad] == ["mask"]
    assert len(found.masks) == 2


def test_other_masks_are_other_shards(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "suffix")
    prepare(folder, tmp_path / "out", None, SIZE, masks="-masklabel")
    prepare(folder, tmp_path / "out", None, SIZE, masks="-masklabel")
    Image.new("L", (24, 40), 9).save(folder / "0-masklabel.png")
    with pytest.raises(ValueError, match="holds other pictures"):
        prepare(folder, tmp_path / "out", None, SIZE, masks="-masklabel")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = miniature.project(tmp_path_factory.mktemp("masked"))
    miniature.teacher(root)
    return root


@pytest.mark.parametrize("cached", [False, True])
def test_the_loss_gets_masks_cropped_and_flipped_as_the_pictures_are(model: Path, tmp_path: Path, cached: bool) -> None:
    """The masks are the pictures themselves; from a cache of latents, too, by the picture that it keeps beside."""
    folder = folder_of(tmp_path, "suffix")
    assembly = assemble(*run_of(model, tmp_path, folder, "-masklabel", cached=cached))
    batches, flips = assembly.loader.batches(0), set()
    for _ in range(12):
        batch = next(batches)
        seen, weight = batch["seen"].mean(1, keepdim=True), batch["loss_weight"]
        assert weight.shape == (2, 1, SIZE, SIZE)
        torch.testing.assert_close(weight, seen, rtol=0, atol=0.02)
        if cached:
            assert "moments" in batch
            assert "image" not in batch
        flips |= {round(float(w[0, 0, 0] - w[0, 0, -1]), 3) for w in weight}
    assert min(flips) < 0 < max(flips)


def run_of(model: Path, out: Path, folder: Path, where: str, *, cached: bool) -> tuple[Any, ...]:
    tree = {
        "name": "masked", "out": str(out / "run"),
        "task": {
            "kind": "finetune", "base": str(model / "teacher"), "images": str(folder), "masks": where,
            "options": {"drop": 0.0, "mask": {"outside": 0.1, "normalize": True}},
            "cache": str(out / "cache") if cached else None, "adapter": {"kind": "lora", "targets": ["attention"]},
        },
        "data": {
            "kind": "shards", "path": str(out / "data"), "size": SIZE, "flip": True, "last": "wrap",
            "crop": "center" if cached else "random",
            "pairs": {"loss_weight": {"kind": "stored", "channels": 1}, "seen": {"kind": "picture"}},
        },
        "train": miniature.train(steps=2, batch=2),
    }  # fmt: skip
    run = decode(RunConfig, tree)
    return run.task, run.data, run.train, run.seed, run.workers


def test_the_loss_of_a_recipe_takes_the_mask(model: Path, tmp_path: Path) -> None:
    """Twice the loss of the same batch with half the weight everywhere, without normalising."""
    folder = folder_of(tmp_path, "suffix")
    task, *rest = run_of(model, tmp_path, folder, "-masklabel", cached=True)
    from dataclasses import replace

    from ldm.objectives.masked import MaskOptions
    from ldm.rng import Rng

    task = replace(task, options=replace(task.options, mask=MaskOptions()))
    assembly = assemble(task, *rest)
    batch = next(assembly.loader.batches(0))
    losses = []
    for level in (0.4, 0.8):
        batch["loss_weight"] = torch.full_like(batch["loss_weight"], level)
        with torch.no_grad():
            losses.append(float(assembly.objective(batch, Rng.of(1, batch["position"]))[0]))
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": {"pairs": {}}}, r"data.pairs: no 'loss_weight', which task.options.mask needs"),
        ({"task": {"options": {"drop": 0.0}}}, r"task.masks: '-masklabel', but the loss has no mask"),
    ],
)
def test_masks_that_do_not_reach_the_loss_are_refused(model: Path, tmp_path: Path, change: Any, told: str) -> None:
    from dataclasses import replace

    from ldm.objectives.denoise import DenoiseOptions

    folder = folder_of(tmp_path, "suffix")
    task, data, *rest = run_of(model, tmp_path, folder, "-masklabel", cached=False)
    if "data" in change:
        data = replace(data, pairs={})
    else:
        task = replace(task, options=DenoiseOptions(drop=0.0))
    with pytest.raises(ValueError, match=told):
        assemble(task, data, *rest)
