"""From shards to batches: the same global batches for any ranks, workers and accumulation, resumable at any step."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ldm.config.load import encode
from ldm.data.arrays import check_names, stack
from ldm.data.augment import augmented
from ldm.data.buckets import BucketedOrder, name
from ldm.data.captions import check_template, filled, names_fields, spoken, uniform, with_trigger
from ldm.data.decode import BadSample
from ldm.data.images import Fit, to_float
from ldm.data.manifest import Manifest, Shard, json_line, resolve
from ldm.data.order import Order, mix
from ldm.data.pairs import Pair, cached_pairs, check_pairs, delivered, delivered_cached, make
from ldm.data.remote import RemoteConfig
from ldm.data.resized import Regrouped, Resized
from ldm.data.samples import Crops, Samples
from ldm.data.stream import Stream
from ldm.data.tags import Tags
from ldm.types import Batch


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples, in which order, and what is made of them.

    `path` is a shipped data set's name (emoji), a folder or an address with a manifest.json, or the manifest. `size` is
    the side of the square pictures. `captions`: "weighted" draws among a sample's captions by their weights, "first"
    takes the plain one, "none" opens no text, whose faults then cost no picture. `template` wraps the caption, `tags`
    shuffles and drops its parts (not of cached text), `wildcards` draws a line of it and one of each {a|b|c} (neither).
    `trigger` is a word that each caption gets: for [trigger] in it, or before a caption that lacks it. `colour`: by how
    much brightness, contrast and saturation differ at most, `rotate`: degrees (both not of cached latents). Each sample
    comes `repeats` times an epoch (times what its folder's name asked for). With `buckets` every batch has the shape of
    one bucket of the data set, and `size` is not used. `memory` bounds in bytes what is kept decoded. `last` is the
    rule for an epoch's last partial batch. Bad samples are replaced and listed in `quarantine`; above the rate
    `max_bad` the run stops. `arrays` names npy and safetensors members that the batch shall hold, `pairs` further
    pictures of each sample by name (`ldm.data.pairs`).
    """

    kind: Literal["shards"] = "shards"
    path: str
    split: str = "train"
    """The part of the data set that is read."""
    size: int = 64
    fit: Fit = "crop"
    """How a picture becomes a square: "crop" covers it, "pad" fits inside on white, "stretch" is exact."""
    crop: Literal["center", "random"] = "center"
    """Where it is cut."""
    flip: bool = False
    """Whether half of the samples are mirrored."""
    captions: Literal["weighted", "first", "none"] = "weighted"
    template: str = "{}"
    require_captions: bool = True
    """Whether a sample without a caption is a bad one; else its caption is empty."""
    arrays: tuple[str, ...] = ()
    pairs: dict[str, Pair] = field(default_factory=dict)
    tags: Tags | None = None
    wildcards: bool = False
    trigger: str = ""
    colour: float = 0.0
    rotate: float = 0.0
    repeats: int = 1
    cached: bool = False
    """Whether the data set holds latents and text states instead of pictures and captions."""
    buckets: bool = False
    shuffle: bool = True
    """Whether each epoch has an order of its own."""
    window: int = 1 << 16
    """Samples that are shuffled among each other at a time; beyond that shards are."""
    last: Literal["drop", "wrap"] = "drop"
    memory: int = 1 << 30
    max_bad: float = 0.05
    quarantine: str | None = None
    remote: RemoteConfig = field(default_factory=RemoteConfig)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.captions == "none" and self.cached:
            raise ValueError("captions: none is for pictures; a cache has its texts")
        check_names(self.arrays)
        check_pairs(self.pairs, self.arrays)
        if self.arrays and self.cached:
            raise ValueError("arrays: a cache holds no other members; leave them out or train without it")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        check_template(self.template)
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad must be in [0, 1], got {self.max_bad}")
        if self.tags is not None and self.cached:
            raise ValueError("tags: cached text states cannot be shuffled; leave it out or train without the cache")
        if self.wildcards and self.cached:
            raise ValueError("wildcards: cached text states have one text; leave it out or train without the cache")
        if not 0 <= self.colour < 1 or not 0 <= self.rotate <= 45:
            raise ValueError(f"colour {self.colour} must be in [0, 1), rotate {self.rotate} in [0, 45] degrees")
        for key, value in (("colour", self.colour), ("rotate", self.rotate)):
            if value and self.cached:
                raise ValueError(f"{key}: {value} of cached latents, which stay as they are: train without the cache")
            if value and self.pairs:
                raise ValueError(f"{key}: {value}, but pairs {sorted(self.pairs)} would not change with it")
        if self.memory < 0:
            raise ValueError(f"memory must not be negative, got {self.memory}")


class Quarantine:
    """Counts bad samples by shard and reason, lists each once, and stops the run above a rate."""

    def __init__(self, path: str | None, max_bad: float) -> None:
        self.path = None if path is None else Path(path)
        self.max_bad = max_bad
        self.counts: Counter[tuple[str, str]] = Counter()
        self.seen = 0
        self._known: set[int] = set()
        self._lock = threading.Lock()

    @property
    def bad(self) -> int:
        """How many different samples were bad."""
        return len(self._known)

    def add(self, sample: int, key: str, shard: str, error: BadSample) -> None:
        """Record one; ValueError if more than `max_bad` of at least 100 samples were bad."""
        with self._lock:
            if sample in self._known:
                return
            self._known.add(sample)
            self.counts[shard, error.reason] += 1
            if self.path is not None:
                line = {"key": key, "shard": shard, "reason": error.reason, "error": error.detail}
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json_line(line) + "\n")
            if self.bad > max(self.max_bad * max(self.seen, 100), 1):
                worst = ", ".join(f"{n} x {reason} in {shard}" for (shard, reason), n in self.counts.most_common(3))
                raise ValueError(
                    f"data: {self.bad} of {self.seen} samples are bad, more than max_bad={self.max_bad}: {worst}; "
                    f"the last: {error.detail}"
                )


class _Chosen:
    """A batch's samples by row, and how many candidates each position has used up."""

    def __init__(self, ids: list[int], positions: list[int]) -> None:
        self.ids = ids
        self.positions = positions
        self.attempts = [0] * len(ids)


class Loader(Stream[DataConfig]):
    """The stream of one data set."""

    def _open(self) -> None:
        config = self.config
        self.manifest = Manifest.read(resolve(config.path), config.remote)
        self.samples = Samples(
            self.manifest,
            config.split,
            size=config.size,
            fit=config.fit,
            cached=config.cached,
            buckets=config.buckets,
            memory=config.memory,
            require_captions=config.require_captions,
            texts=config.captions != "none",
            arrays=config.arrays,
            pairs=config.pairs,
            expect=expected(config, self._expect),
            remote=config.remote,
        )
        self._pairs = config.pairs or cached_pairs(self.manifest.cached if config.cached else None)
        self.order: Order | BucketedOrder | Resized | Regrouped = self._ordered(self.global_batch)
        self.quarantine = Quarantine(config.quarantine, config.max_bad)

    def _ordered(self, batch: int) -> Order | BucketedOrder:
        return make_order(self.config, self.samples.shards.shards, batch, self._seed)

    def _resize(self) -> None:
        order = self._ordered(self.sizes.parts[0][1])
        if len(self.sizes.parts) == 1:
            self.order = order
        elif isinstance(order, BucketedOrder):
            self.order = Regrouped(order, self.sizes)
        else:
            self.order = Resized(order, self.sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, equal on all ranks."""
        return self.order.steps_per_epoch

    @property
    def kept_bytes(self) -> int:
        """Bytes of decoded samples held in memory."""
        return self.samples.kept_bytes

    @property
    def bad(self) -> int:
        """How many different bad samples were met and replaced."""
        return self.quarantine.bad

    def batch(self, step: int, micro_step: int) -> Batch:
        """One micro-batch, a pure function of its place."""
        return self.batch_at(step, micro_step, self.sizes.first(step))

    def batch_at(self, step: int, micro_step: int, first: int) -> Batch:
        """The samples of this stream's step, at global positions from `first` on (of a mixture's step)."""
        chosen = self._slots(micro_step)
        ids = self.order.ids(step, chosen).tolist()
        return self.assemble(ids, (first + chosen).tolist())

    def assemble(self, ids: list[int], positions: list[int]) -> Batch:
        """The batch of samples at global positions; bad ones are replaced."""
        self.samples.begin(ids)
        chosen = _Chosen(list(ids), positions)
        self.quarantine.seen += len(ids)
        self._replace_bad(chosen)
        tensors, picks = self._cached(chosen) if self.config.cached else ({}, self._picks(chosen.ids, positions))
        ids = chosen.ids
        batch: Batch = {
            "key": [self.samples.key(i) for i in ids],
            "position": torch.tensor(positions, dtype=torch.int64),
            "weight": torch.ones(len(ids), dtype=torch.float32),
            "source": [self.manifest.name] * len(ids),
            **tensors,
        }
        texts = [self.samples.captions(i).texts[p] for i, p in zip(ids, picks, strict=True)]
        if self.config.wildcards:
            texts = [spoken(t, self._seed, p) for t, p in zip(texts, positions, strict=True)]
        if self.config.tags is not None and not self.config.cached:
            texts = [self.config.tags.apply(t, self._seed, p) for t, p in zip(texts, positions, strict=True)]
        batch["caption"] = [self._filled(i, text) for i, text in zip(ids, texts, strict=True)]
        if not self.config.cached:
            crops = self.samples.crop(ids, self._crops(positions), self._flips(positions))
            batch["image"] = to_float(self._augmented(crops.pixels, positions))
            batch["original_size"] = torch.from_numpy(crops.original_size)
            batch["crop_top_left"] = torch.from_numpy(crops.crop_top_left)
            batch |= self._partners(crops, positions)
        if "original_size" in batch:
            width, height = self.samples.shape(ids[0])
            batch["target_size"] = torch.tensor([[height, width]], dtype=torch.float32).repeat(len(ids), 1)
        if self.config.arrays:
            batch.update(stack([self.samples.arrays(i) for i in ids], batch["key"]))
        if self._tokenize is not None:
            batch["tokens"] = self._tokenize(batch["caption"])
        return batch

    def _augmented(self, pixels: Any, positions: Sequence[int]) -> Any:
        """The pictures (B, H, W, 3) with other colours and turned, if so configured."""
        colour, rotate = self.config.colour, self.config.rotate
        if not colour and not rotate:
            return pixels
        draws = [functools.partial(uniform, self._seed, p) for p in positions]
        return np.stack([augmented(row, colour, rotate, draw) for row, draw in zip(pixels, draws, strict=True)])

    def _partners(self, crops: Crops, positions: Sequence[int]) -> Batch:
        """The pairs' pictures, what is random in them drawn for the positions."""
        draw = lambda row, purpose: uniform(self._seed, positions[row], purpose)  # noqa: E731
        made = make(self._pairs, crops.pixels, crops.partners, draw)
        return {name: delivered(pair, made[name]) for name, pair in self._pairs.items()}

    def _filled(self, sample: int, text: str) -> str:
        template, text = self.config.template, with_trigger(text, self.config.trigger)
        known = self.config.captions != "none" and names_fields(template)
        return filled(template, text, self.samples.meta(sample)) if known else template.replace("{}", text)

    def _picks(self, ids: Sequence[int], positions: Sequence[int]) -> list[int]:
        if self.config.captions != "weighted":
            return [0] * len(ids)
        known = [self.samples.captions(i) for i in ids]
        pairs = zip(known, positions, strict=True)
        return [0 if len(c.texts) == 1 else c.pick(uniform(self._seed, p, "caption")) for c, p in pairs]

    def _crops(self, positions: Sequence[int]) -> list[tuple[float, float]] | None:
        if self.config.crop == "center":
            return None
        return [(uniform(self._seed, p, "crop x"), uniform(self._seed, p, "crop y")) for p in positions]

    def _flips(self, positions: Sequence[int]) -> list[bool] | None:
        return [uniform(self._seed, p, "flip") < 0.5 for p in positions] if self.config.flip else None

    def _cached(self, chosen: _Chosen) -> tuple[Batch, list[int]]:
        """Cached tensors and the captions' numbers; a sample whose values turn out damaged is replaced here alone.

        It may be whole in another variant or caption, so that to refuse it elsewhere would depend on who met it first.
        """
        one = (self.manifest.cached or {}).get("variants") == 1
        variants = [0.0 if one else uniform(self._seed, p, "variant") for p in chosen.positions]
        while True:
            picks = self._picks(chosen.ids, chosen.positions)
            tensors, bad = self.samples.cached(chosen.ids, picks, variants)
            if not bad:
                return delivered_cached(self._pairs, tensors), picks
            for row, error in bad.items():
                self._reject(chosen, row, error)
            self._replace_bad(chosen)

    def _replace_bad(self, chosen: _Chosen) -> None:
        """Put the first good one of a sequence that belongs to its position for each bad sample; touches (decodes)
        each sample."""
        for row in range(len(chosen.ids)):
            while (error := self.samples.touch(chosen.ids[row])) is not None:
                self._reject(chosen, row, error)

    def _reject(self, chosen: _Chosen, row: int, error: BadSample) -> None:
        """Put the next candidate for a row's position."""
        sample = chosen.ids[row]
        shard = self.samples.shards.shards[self.samples.shards.locate(sample)[0]].file
        self.quarantine.add(sample, self.samples.key(sample), shard, error)
        chosen.attempts[row] += 1
        if chosen.attempts[row] > 1000:
            raise ValueError(f"data: 1000 samples in a row are bad; the last is {error}")
        draw = int(mix(self._seed, chosen.positions[row], chosen.attempts[row])[0] >> 1)
        chosen.ids[row] = self._other(sample, draw)

    def _other(self, near: int, draw: int) -> int:
        """A sample by a number, of the same shape as another."""
        if not self.config.buckets:
            return draw % len(self.samples)
        shards = self.samples.shards
        bucket = shards.shards[shards.locate(near)[0]].bucket
        starts = np.cumsum(shards.sizes) - shards.sizes
        same = [i for i, s in enumerate(shards.shards) if s.bucket == bucket]
        shard = same[draw % len(same)]
        return int(starts[shard]) + draw // len(same) % shards.sizes[shard]


def expected(config: DataConfig, also: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a cache must have been made with: `also`, and what the config sets of size, fit, crop, flip, template and
    pairs."""
    names = ("fit", "crop", "flip", "template", "trigger", *(() if config.buckets else ("size",)))
    defaults = {f.name: f.default for f in fields(DataConfig)}
    pairs = {"pairs": encode(config.pairs)} if config.pairs else {}
    return {n: v for n in names if (v := vars(config)[n]) != defaults[n]} | pairs | dict(also or {})


def make_order(config: DataConfig, shards: Sequence[Shard], batch: int, seed: int) -> Order | BucketedOrder:
    """The order over shards, by bucket if the config says so. ValueError names a bucket smaller than a batch."""
    sizes = np.array([s.samples for s in shards], np.int64)
    starts = np.cumsum(sizes) - sizes

    def order(chosen: Sequence[int], salt: int) -> Order:
        return Order(
            sizes=tuple(int(sizes[i]) for i in chosen),
            repeats=tuple(shards[i].repeats * config.repeats for i in chosen),
            starts=tuple(int(starts[i]) for i in chosen),
            batch=batch,
            seed=seed + salt,
            shuffle=config.shuffle,
            window=config.window,
            last=config.last,
        )

    if not config.buckets:
        return order(range(len(shards)), 0)
    found = sorted({s.bucket for s in shards if s.bucket is not None})
    orders = {}
    for number, bucket in enumerate(found):
        try:
            orders[bucket] = order([i for i, s in enumerate(shards) if s.bucket == bucket], number)
        except ValueError as error:
            raise ValueError(f"bucket {name(bucket)}: {error}, or build with a larger --bucket-least") from error
    return BucketedOrder(orders, seed, config.shuffle)
