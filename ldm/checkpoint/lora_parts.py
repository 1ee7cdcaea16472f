"""The tensors of one layer in a LoRA file -> its correction, shapes and axes checked against the model's weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldm.adapters.corrections import Correction, Difference, Hadamard, Kronecker, Rotation
from ldm.adapters.layers import skewed
from ldm.adapters.low_rank import LowRank
from ldm.checkpoint.lora_settings import Settings
from ldm.checkpoint.weights import alike

Parts = Mapping[str, Tensor]


class Misfit(ValueError):
    """A correction of a weight of another shape."""


def assemble(site: str, parts: Parts, shape: Sequence[int], settings: Settings) -> dict[str, Correction]:
    """The corrections of a layer and of its bias, by name; `shape` is the weight's.

    Raises Misfit for another shape, ValueError for parts that do not belong together.
    """
    found: dict[str, Correction] = {}
    kinds = set(parts) - {"alpha", "magnitude", "dora_scale", "up_bias", "diff_b", "b_norm"}
    form = tuple(shape)
    if not kinds:
        pass
    elif kinds <= {"down", "up", "mid"}:
        found[site] = _low_rank(site, parts, form, settings)
    elif kinds <= {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}:
        found[site] = _hadamard(site, parts, form, settings)
    elif all(k.startswith("lokr_") for k in kinds):
        found[site] = _kronecker(site, parts, form, settings)
    elif "oft_blocks" in kinds and kinds <= {"oft_blocks", "rescale"}:
        found[site] = _rotation(site, parts, form)
    elif kinds == {"oft_R"}:
        found[site] = _turned_inputs(site, parts, form, settings)
    elif kinds in ({"diff"}, {"w_norm"}):
        found[site] = Difference(_shaped(site, parts[next(iter(kinds))], form), *_magnitude(site, parts, form))
    else:
        raise ValueError(f"{site} has the parts {sorted(parts)}, which do not belong together")
    if settings.decomposed(site) and found and found[site].magnitude is None:
        raise ValueError(f"{settings.where} says DoRA, and {site} has no magnitudes")
    for kind in ("diff_b", "b_norm"):
        if kind in parts:
            found[f"{site}.bias"] = Difference(parts[kind].flatten())
    if "up_bias" in parts:
        low = found.get(site)
        if not isinstance(low, LowRank) or low.magnitude is not None:
            raise ValueError(f"{site}: a bias of lora_B needs a plain lora_A and lora_B")
        found[f"{site}.bias"] = Difference(low.scale * parts["up_bias"].flatten())
    return found


def _low_rank(site: str, parts: Parts, form: tuple[int, ...], settings: Settings) -> LowRank:
    down, up = _both(site, parts, "down", "up")
    if down.ndim < 2 or up.ndim < 2:
        raise ValueError(f"{site}: down {list(down.shape)} and up {list(up.shape)} are no matrices")
    rank = down.shape[0]
    if "mid" in parts:  # a convolution in three: its kernel joins the side that goes in
        down = torch.einsum("rskl,si->rikl", parts["mid"], down.flatten(1))
    if down.shape[0] != up.shape[1] or rank != up.flatten(1).shape[1]:
        raise ValueError(f"{site} has ranks {down.shape[0]} and {up.shape[1]}")
    found = (up.shape[0], *down.shape[1:])
    if not alike(found, form):
        raise Misfit(f"{site} has shape {found}, the model's is {form}: another base model?")
    scale = _scale(site, parts, rank, settings)
    up, down = up.reshape(len(up), rank, *[1] * (len(form) - 2)), down.reshape(rank, *form[1:])
    return LowRank(down, up, scale * rank, *_magnitude(site, parts, form))


def _hadamard(site: str, parts: Parts, form: tuple[int, ...], settings: Settings) -> Hadamard:
    sides = []
    for i in (1, 2):
        a, b = _both(site, parts, f"hada_w{i}_a", f"hada_w{i}_b")
        rank = b.shape[0]
        if (core := parts.get(f"hada_t{i}")) is not None:
            a, b = a.T, torch.einsum("ijkl,jr->irkl", core, b)
        sides += [a, b]
    a1, b1, a2, b2 = sides
    numbers = {len(a) * b[0].numel() for a, b in ((a1, b1), (a2, b2))}
    if numbers != {math.prod(form)} or len(a1) != form[0] or len(a2) != form[0]:
        raise Misfit(f"{site} has {sorted(numbers)} numbers, the model's weight is {form}: another base model?")
    return Hadamard(a1, b1, a2, b2, _scale(site, parts, rank, settings), form, *_magnitude(site, parts, form))


def _kronecker(site: str, parts: Parts, form: tuple[int, ...], settings: Settings) -> Kronecker:
    rank: int | None = None
    sides: list[Tensor] = []
    for i in (1, 2):
        if (whole := parts.get(f"lokr_w{i}")) is not None:
            sides.append(whole)
            continue
        a, b = _both(site, parts, f"lokr_w{i}_a", f"lokr_w{i}_b")
        rank = b.shape[0]
        if i == 2 and (core := parts.get("lokr_t2")) is not None:
            sides.append(torch.einsum("ijkl,jr,ip->prkl", core, b, a))
        else:
            sides.append(a @ b.flatten(1))
    w1, w2 = sides
    whole = "lokr_w2" in parts or "lokr_t2" in parts
    low, high = (None, None) if whole else _both(site, parts, "lokr_w2_a", "lokr_w2_b")
    found = (w1.shape[0] * w2.shape[0], w1.shape[1] * math.prod(w2.shape[1:]))
    if found != (form[0], math.prod(form[1:])) or (w2.ndim == 4 and not alike(w2.shape[2:], form[2:] or (1, 1))):
        raise Misfit(f"{site} is a product of shape {found}, the model's weight is {form}: another base model?")
    told = rank is None and not settings.of(site)[0]  # two whole factors: other readers leave alpha out
    scale = 1.0 if told else _scale(site, parts, rank or 1, settings)
    return Kronecker(w1, w2, scale, form, *_magnitude(site, parts, form), low, high)


def _rotation(site: str, parts: Parts, form: tuple[int, ...]) -> Rotation:
    """LyCORIS' diag-oft and kohya's OFT: outputs turned in blocks, alpha bounds the turning."""
    blocks, rescale = parts["oft_blocks"], parts.get("rescale")
    if blocks.ndim == 4:
        raise ValueError(f"{site} is turned by BOFT, butterflies of blocks, which is not known here; OFT is")
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or blocks.shape[0] * blocks.shape[1] != form[0]:
        raise Misfit(f"{site} has blocks {tuple(blocks.shape)}, the model's weight is {form}: another base model?")
    if rescale is not None and rescale.numel() != form[0]:
        raise Misfit(f"{site} has scales {tuple(rescale.shape)}, the model's weight is {form}: another base model?")
    most = float(parts["alpha"]) * form[0] if "alpha" in parts else 0.0
    return Rotation(skewed(blocks, max(most, 0.0)), form, None if rescale is None else rescale.flatten())


def _turned_inputs(site: str, parts: Parts, form: tuple[int, ...], settings: Settings) -> Rotation:
    """PEFT's OFT: inputs turned in blocks, of which the upper triangles (k, s (s - 1) / 2) are stored.

    The exact transform is of -Q there, the series (the default, of 5 terms) of Q.
    """
    told, columns = settings.of(site)[0], parts["oft_R"]
    if columns.ndim != 2:
        raise ValueError(f"{site}: oft_R has shape {tuple(columns.shape)}, expected (blocks, numbers of a triangle)")
    side, inputs = math.isqrt(2 * columns.shape[1]) + 1, math.prod(form[1:])
    if side * (side - 1) // 2 != columns.shape[1] or inputs % side:
        raise Misfit(f"{site} has blocks {tuple(columns.shape)}, the model's weight is {form}: another base model?")
    skew = columns.new_zeros(len(columns), side, side)
    rows = torch.triu_indices(side, side, 1)
    skew[:, rows[0], rows[1]] = columns
    skew = skew - skew.transpose(1, 2)
    if len(skew) == 1 and told.get("block_share"):
        skew = skew.repeat(inputs // side, 1, 1)
    if len(skew) * side != inputs:
        raise Misfit(f"{site} has blocks {tuple(columns.shape)}, the model's weight is {form}: another base model?")
    if told.get("use_cayley_neumann", True):
        return Rotation(skew, form, None, int(told.get("num_cayley_neumann_terms", 5)), inputs=True)
    return Rotation(-skew, form, inputs=True)


def _both(site: str, parts: Parts, one: str, other: str) -> tuple[Tensor, Tensor]:
    if one not in parts or other not in parts:
        raise ValueError(f"{site} has {sorted(parts)}, and needs both {one} and {other}")
    return parts[one], parts[other]


def _scale(site: str, parts: Parts, rank: int, settings: Settings) -> float:
    if "alpha" not in parts:
        return settings.scale(site, rank)
    if parts["alpha"].numel() != 1:
        raise ValueError(f"{site}: alpha has shape {list(parts['alpha'].shape)}, expected one number")
    return float(parts["alpha"]) / rank


def _shaped(site: str, value: Tensor, form: tuple[int, ...]) -> Tensor:
    if not alike(value.shape, form):
        raise Misfit(f"{site} has shape {tuple(value.shape)}, the model's is {form}: another base model?")
    return value.reshape(form)


def _magnitude(site: str, parts: Parts, form: tuple[int, ...]) -> tuple[Tensor | None, int]:
    """DoRA's magnitudes and their axis: 0, a number for each output's row; 1, for each input's column.

    PEFT's are by row. LyCORIS' and OneTrainer's `dora_scale` tells by its shape: (out, 1, ..) by row, (1, in, ..) by
    column; a plain (n,) is by row where that fits, so also for a square weight.
    """
    value = parts.get("magnitude", parts.get("dora_scale"))
    if value is None:
        return None, 0
    if len(form) < 2:
        raise ValueError(f"{site}: magnitudes of a vector")
    count, rows, columns = value.numel(), form[0], form[1]
    lying = value.ndim > 1 and value.shape[0] == 1 and value.shape[1] == count
    if "magnitude" not in parts and lying and count == columns and not (count == 1 and rows == 1):
        return value.flatten(), 1
    if count == rows:
        return value.flatten(), 0
    if "magnitude" not in parts and count == columns and not (value.ndim > 1 and value.shape[0] == count):
        return value.flatten(), 1
    raise Misfit(f"{site} has magnitudes {tuple(value.shape)}, the model's weight is {form}: another base model?")
