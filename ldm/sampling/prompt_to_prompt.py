"""Cross-attention control (prompt-to-prompt, arXiv 2208.01626): one picture, another prompt, the same composition.

The batch holds the source prompt first and K edits of it, all from the same starting noise. With guidance the batch
comes doubled, unconditional rows first; only the conditional half is edited. Use:

    edit = PromptToPrompt(rows, steps=steps, ...)
    with controlled(unet, edit):
        sample(..., edit.blend(guided), x.expand(K + 1, ...), cond, steps=steps, progress=edit.progress)

Legend: B batch, N queries (pixels of one resolution), T tokens, K edits. Tensor code only: knows no network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.control import looks_at_text
from ldm.types import Cond, Denoise


@dataclass(frozen=True)
class Edit:
    """How one edited prompt's attention is made of the source's.

    `mapping` (T, T): column j says which source tokens token j of the edit takes its map from. `blend` (T,) in [0, 1]:
    how much of token j comes from the source at all. `scale` (T,): factor on the map of token j.
    """

    mapping: Tensor
    blend: Tensor
    scale: Tensor


def spans(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """Runs of tokens that differ, as (source, edit) ranges, by the longest common subsequence of token ids."""
    n, m = len(before), len(after)
    table = [[0] * (m + 1) for _ in range(n + 1)]
    for i in reversed(range(n)):
        for j in reversed(range(m)):
            same = before[i] == after[j]
            table[i][j] = table[i + 1][j + 1] + 1 if same else max(table[i + 1][j], table[i][j + 1])
    found, i, j = [], 0, 0
    while i < n or j < m:
        if i < n and j < m and before[i] == after[j]:
            i, j = i + 1, j + 1
            continue
        start_i, start_j = i, j
        while (i < n or j < m) and not (i < n and j < m and before[i] == after[j]):
            if j >= m or (i < n and table[i + 1][j] >= table[i][j + 1]):
                i += 1
            else:
                j += 1
        found.append((range(start_i, i), range(start_j, j)))
    return found


def _aligned(before: Sequence[int], after: Sequence[int], length: int) -> Tensor:
    """Identity where tokens agree, by position in the common subsequence; empty columns elsewhere."""
    if max(len(before), len(after)) > length:
        raise ValueError(f"prompts must have at most {length} tokens, got {len(before)} and {len(after)}")
    mapping = torch.zeros(length, length)
    i = j = 0
    for source, edit in [*spans(before, after), (range(length, length), range(length, length))]:
        while i < source.start and j < edit.start:  # equal tokens, and after both prompts the padding
            mapping[i, j] = 1
            i, j = i + 1, j + 1
        i, j = source.stop, edit.stop
    return mapping


def word_swap(before: Sequence[int], after: Sequence[int], length: int) -> Edit:
    """Every token of the edit takes the source's map; a swapped word takes the mean of the words it replaces.

    `before`, `after`: token ids without padding; `length` the padded one. Raises ValueError where tokens were only
    added or removed: that is a refinement.
    """
    mapping = _aligned(before, after, length)
    for source, edit in spans(before, after):
        if not source or not edit:
            raise ValueError("word swap needs as many places in both prompts; use a refinement for added words")
        for j_at, j in enumerate(edit):
            if len(source) == len(edit):
                mapping[source[j_at], j] = 1
            else:
                mapping[list(source), j] = 1 / len(source)
    return Edit(mapping, (mapping.sum(0) > 0).float(), torch.ones(length))


def refinement(before: Sequence[int], after: Sequence[int], length: int) -> Edit:
    """Common tokens take the source's map, new ones keep their own."""
    mapping = _aligned(before, after, length)
    return Edit(mapping, mapping.sum(0), torch.ones(length))


def reweight(edit: Edit, scales: dict[int, float]) -> Edit:
    """The edit with the maps of some token positions multiplied; negative scales reverse a word."""
    scale = edit.scale.clone()
    for position, value in scales.items():
        if not 0 <= position < len(scale):
            raise ValueError(f"token position must lie in [0, {len(scale) - 1}], got {position}")
        scale[position] = value
    return Edit(edit.mapping, edit.blend, scale)


def unchanged(length: int) -> Edit:
    """The same prompt, for re-weighting alone."""
    return Edit(torch.eye(length), torch.ones(length), torch.ones(length))


def joined(edits: Sequence[Edit]) -> Edit:
    """One edit of several texts that stand one after the other, each with its own."""
    mapping = torch.block_diag(*(edit.mapping for edit in edits))
    return Edit(mapping, torch.cat([e.blend for e in edits]), torch.cat([e.scale for e in edits]))


class PromptToPrompt:
    """Edits attention weights during one sampling run; see the module for its use. Good for one run.

    The source's cross-attention is used for the first `cross` of the steps and its self-attention for the first `own`,
    there only on maps of at most `own_pixels` queries (None: all). `words`: for each row (source first) the token
    positions whose maps say where local blend may change the picture; None changes all of it. `start_blend`: the share
    of steps before local blend begins; `threshold` on the map relative to its maximum; `shape`: see `AttentionMaps`.
    """

    def __init__(
        self,
        edits: Sequence[Edit],
        *,
        steps: int,
        cross: float = 0.8,
        own: float = 0.4,
        own_pixels: int | None = 256,
        words: Sequence[Sequence[int]] | None = None,
        threshold: float = 0.3,
        start_blend: float = 0.2,
        shape: tuple[int, int] | None = None,
    ) -> None:
        if not edits:
            raise ValueError("edits must not be empty")
        for key, value in (("cross", cross), ("own", own), ("threshold", threshold), ("start_blend", start_blend)):
            if not 0 <= value <= 1:
                raise ValueError(f"{key} must lie in [0, 1], got {value}")
        if words is not None and len(words) != len(edits) + 1:
            raise ValueError(f"words needs one entry per row, {len(edits) + 1}, got {len(words)}")
        self.edits, self.steps, self.cross, self.own, self.own_pixels = list(edits), steps, cross, own, own_pixels
        self.words, self.threshold, self.start_blend = words, threshold, start_blend
        self.step = 0
        self.maps = AttentionMaps(rows=len(edits) + 1, shape=shape)

    def progress(self, index: int, x: Tensor) -> None:
        """To be called after each sampling step, as `sample`'s progress."""
        self.step = index + 1

    def __call__(self, name: str, weights: Tensor) -> Tensor:
        """The control of one layer: weights (B, heads, N, keys) in, edited weights out."""
        rows = len(self.edits) + 1
        if weights.shape[0] % rows:
            raise ValueError(f"the batch must hold {rows} rows, once or twice, got {weights.shape[0]}")
        free, row = weights[:-rows], weights[-rows:]
        if not looks_at_text(name):
            fine = self.own_pixels is not None and row.shape[2] > self.own_pixels
            if self.step >= self.own * self.steps or fine:
                return weights
            return torch.cat([free, row[:1].expand_as(row)])
        source = row[:1]
        edited = [source]
        for own, edit in zip(row[1:].split(1), self.edits):
            mapping, blend, scale = (v.to(own) for v in (edit.mapping, edit.blend, edit.scale))
            if self.step < self.cross * self.steps:
                own = blend * (source @ mapping) + (1 - blend) * own
            edited.append(own * scale)
        out = torch.cat(edited)
        self.maps(name, out)
        return torch.cat([free, out])

    def blend(self, denoise: Denoise) -> Denoise:
        """Local blend: outside the words' place the edits' estimates of x_0 are the source's (section 4, "Local")."""
        if self.words is None:
            return denoise

        def blended(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            x0 = denoise(x, t, cond)
            if self.step < self.start_blend * self.steps:
                return x0
            mask = self.mask(x0.shape[-2:]).to(x0)
            return x0[:1] + mask * (x0 - x0[:1])

        return blended

    def mask(self, size: tuple[int, ...] | torch.Size) -> Tensor:
        """Where each row may change, (K + 1, 1, H, W) of zeros and ones: its own words' place and the source's."""
        assert self.words is not None
        found = []
        for row, places in enumerate(self.words):
            heat = self.maps.of(row, list(places))
            heat = F.interpolate(F.max_pool2d(heat[None, None], 3, 1, 1), size=tuple(size), mode="bilinear")
            found.append((heat / heat.amax().clamp(min=1e-12) > self.threshold).float())
        own = torch.cat(found)
        return torch.maximum(own, own[:1])


class AttentionMaps:
    """Sums of cross-attention weights over layers, heads and steps, per resolution; a control by itself.

    `rows` is the number of conditional rows of the batch; with guidance the unconditional ones before them are left
    out. `shape`: height and width of the latents, needed unless they are square.
    """

    def __init__(self, rows: int, shape: tuple[int, int] | None = None) -> None:
        self.rows, self.shape = rows, shape
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def __call__(self, name: str, weights: Tensor) -> Tensor:
        if looks_at_text(name):
            mean = weights[-self.rows :].detach().float().mean(1)  # (rows, N, T)
            pixels = mean.shape[1]
            self.sums[pixels] = self.sums[pixels] + mean if pixels in self.sums else mean
            self.counts[pixels] = self.counts.get(pixels, 0) + 1
        return weights

    def of(self, row: int, tokens: Sequence[int], pixels: int | None = None) -> Tensor:
        """The mean map (h, w) of some tokens of a row, at `pixels` queries (default: the finest up to 16 x 16).

        Raises ValueError if nothing was recorded, or the tokens are out of range.
        """
        if not self.sums:
            raise ValueError("no cross-attention was recorded: sample inside `controlled(unet, maps)` first")
        sizes = sorted(self.sums)
        pixels = pixels or max([n for n in sizes if n <= 256] or sizes[:1])
        if pixels not in self.sums:
            raise ValueError(f"pixels must be one of {sizes}, got {pixels}")
        mean = self.sums[pixels][row] / self.counts[pixels]
        if not tokens or max(tokens) >= mean.shape[1] or min(tokens) < 0:
            raise ValueError(f"tokens must be positions in [0, {mean.shape[1] - 1}], got {list(tokens)}")
        return mean[:, list(tokens)].mean(1).unflatten(0, self._size(pixels))

    def _size(self, pixels: int) -> tuple[int, int]:
        if self.shape is None:
            side = math.isqrt(pixels)
            if side * side != pixels:
                raise ValueError(f"{pixels} queries are not square; give AttentionMaps the latents' shape")
            return side, side
        h, w = self.shape
        while h * w > pixels:  # levels halve, rounded up
            h, w = (h + 1) // 2, (w + 1) // 2
        if h * w != pixels:
            raise ValueError(f"{pixels} queries are no halving of the latents' {self.shape[0]} x {self.shape[1]}")
        return h, w
