"""Caches of unscaled posterior moments, partners and text hidden states in shards; knows no model.

The work is cut into parts of consecutive samples; each part becomes one tar and a marker that names its shard. Any
number of processes may share the parts, be killed and started again: a part is whole or absent. `finish` makes the
manifest when no part is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ldm.data.cache import MEMBER, trimmed
from ldm.data.captions import filled, uniform, with_trigger
from ldm.data.claim import SETTINGS, TextStates, claim, finished, read, settings, write
from ldm.data.images import to_float
from ldm.data.manifest import Manifest, Shard, bucket_report, json_line, printable, resolve, shard_of
from ldm.data.offsets import Index
from ldm.data.pairs import cached_name, delivered, make
from ldm.data.parts import EncodeConfig, Part, marker, parts_of
from ldm.data.samples import Crops, Samples
from ldm.data.shards import LOST, Shards
from ldm.data.write import ShardWriter

Moments = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [-1, 1] -> unscaled posterior moments (B, 2Z, h, w)."""
Features = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [-1, 1] -> maps of another network (B, C, h, w), which training is aligned to."""

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Makers:
    """What makes the cached tensors; None of what is not cached."""

    moments: Moments | None
    text: TextStates | None
    features: Features | None


@dataclass
class _Error:
    """Sums of squares of the values and of what storing them lost, by tensor name; captions, bytes of their text."""

    squares: dict[str, float] = field(default_factory=dict)
    captions: int = 0
    text_bytes: int = 0
    lost: dict[str, float] = field(default_factory=dict)

    def store(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        value = value.detach().float().cpu().contiguous()
        stored = value.to(dtype)
        if not torch.isfinite(stored).all():
            raise ValueError(f"cache: {name} is not finite as {dtype}; use another dtype, or look at the model")
        self.squares[name] = self.squares.get(name, 0.0) + float(value.double().square().sum())
        self.lost[name] = self.lost.get(name, 0.0) + float((value.double() - stored.double()).square().sum())
        return stored


def encode(
    config: EncodeConfig,
    out: Path,
    *,
    moments: Moments | None,
    text: TextStates | None,
    hashes: Mapping[str, str],
    features: Features | None = None,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write this rank's missing parts into `out`; `hashes` names the weights, as in {"vae": ..., "text": ...}.

    `features`, of the same pictures as the moments, are stored as float16 whatever the dtype. Raises ValueError if
    `out` holds parts made with other settings. Bad samples are left out; `finish` lists them.
    """
    if config.pairs and moments is None:
        raise ValueError(f"pairs: {sorted(config.pairs)} are cached beside latents, which need an autoencoder")
    out.mkdir(parents=True, exist_ok=True)
    config = claim(config, out, settings(config, moments is not None, text is not None, hashes), text)
    manifest = Manifest.read(resolve(config.path))
    for split in config.splits:
        samples = Samples(
            manifest,
            split,
            size=config.size,
            fit=config.fit,
            buckets=config.buckets,
            memory=0,
            require_captions=config.require_captions,
            pairs=config.pairs,
        )
        for part in parts_of(config, manifest, split):
            if part.number % world != rank:
                continue
            tree = finished(out, part)
            if tree is None or _mended(tree, samples, part):
                _encode_part(config, out, part, samples, Makers(moments, text, features), progress)
            elif progress is not None:
                progress(part.stop - part.start)


def _mended(tree: dict[str, Any], samples: Samples, part: Part) -> bool:
    """Whether a sample that a part left out, because its tar was not what the manifest says, can be read now."""
    bad = [] if isinstance(tree["bad"], int) else tree["bad"]
    lost = {entry["key"] for entry in bad if entry["reason"] in LOST}
    for sample in range(part.start, part.stop) if lost else ():
        samples.begin([sample])
        if samples.key(sample) in lost and samples.touch(sample) is None:
            return True
    return False


def finish(config: EncodeConfig, out: Path) -> Manifest:
    """The manifest over all parts, written, and `quarantine.jsonl`.

    Raises ValueError that names a part that is missing, or if no sample could be encoded.
    """
    told = read(out / SETTINGS)
    config = replace(config, part=told["part"])
    source = Manifest.read(resolve(config.path))
    shards: list[Shard] = []
    sums: dict[str, list[float]] = {}
    bad: list[dict[str, str]] = []
    captions, text_bytes = 0, 0
    for split in config.splits:
        for part in parts_of(config, source, split):
            tree = finished(out, part)
            if tree is None:
                raise ValueError(f"cache {str(out)!r}: part {part.prefix} is missing; run the same encoding again")
            shards += [shard_of(entry) for entry in tree["shards"]]
            bad += _named(tree["bad"], source, part, out, tree["shards"])
            more = tree.get("text", [0, 0])  # older versions did not count them
            captions, text_bytes = captions + more[0], text_bytes + more[1]
            for name, pair in tree["error"].items():
                have = sums.setdefault(name, [0.0, 0.0])
                sums[name] = [have[0] + pair[0], have[1] + pair[1]]
    (out / "quarantine.jsonl").write_text("".join(json_line(entry) + "\n" for entry in bad), encoding="utf-8")
    total = sum(s.samples for s in shards)
    if not total:
        first = "".join(f"; the first: {entry['key']}: {entry['reason']}: {entry['error']}" for entry in bad[:1])
        raise ValueError(printable(f"cache {str(out)!r}: none of {len(bad)} samples could be encoded{first}"))
    notes: dict[str, Any] = {
        "bad": len(bad),
        "bytes_per_sample": round(sum(s.bytes for s in shards) / total),
        "relative_rms_error": {k: (b / a) ** 0.5 if a else 0.0 for k, (a, b) in sorted(sums.items())},
    }
    if captions:
        notes |= {"captions": captions, "text_bytes_per_caption": round(text_bytes / captions)}
    if config.buckets:
        notes["buckets"] = bucket_report(shards, source.notes.get("buckets", {}))
    result = Manifest(
        name=f"{source.name}-cached", shards=tuple(shards), folder=out, cached=told["cached"], notes=notes
    )
    result.write()
    return result


def _named(
    bad: list[dict[str, str]] | int, source: Manifest, part: Part, out: Path, shards: list[dict[str, Any]]
) -> list[dict[str, str]]:
    """The bad samples of a part; the oldest version only counted them."""
    if not isinstance(bad, int):
        return bad
    stored = {k for entry in shards for k in Index.read(out / entry["index"]).keys}
    every = Shards(source, part.split)
    keys = [k for i in range(part.start, part.stop) if (k := every.key(i)) not in stored]
    return [{"key": k, "reason": "left_out", "error": "by an older version, which did not say why"} for k in keys]


def missing(config: EncodeConfig, out: Path) -> int:
    """How many parts other processes still have to write."""
    config = replace(config, part=read(out / SETTINGS)["part"])
    source = Manifest.read(resolve(config.path))
    parts = (p for split in config.splits for p in parts_of(config, source, split))
    return sum(not marker(out, part).is_file() for part in parts)


def build_cache(
    config: EncodeConfig,
    out: Path,
    *,
    moments: Moments | None,
    text: TextStates | None,
    hashes: Mapping[str, str],
    progress: Callable[[int], object] | None = None,
) -> Manifest:
    """`encode` and `finish` on one process; nothing but the manifest is read if it is there and was made so."""
    encode(config, out, moments=moments, text=text, hashes=hashes, progress=progress)
    return finish(config, out)


def _encode_part(
    config: EncodeConfig,
    out: Path,
    part: Part,
    samples: Samples,
    make: Makers,
    progress: Callable[[int], object] | None,
) -> None:
    error = _Error()
    bad: list[dict[str, str]] = []
    with ShardWriter(
        out,
        part.prefix,
        split=part.split,
        bucket=part.bucket,
        repeats=part.repeats,
        max_bytes=1 << 40,
        max_samples=config.part,
    ) as writer:
        for start in range(part.start, part.stop, config.batch):
            ids = list(range(start, min(start + config.batch, part.stop)))
            good = []
            samples.begin(ids)
            for sample in ids:
                problem = samples.touch(sample)
                if problem is None:
                    good.append(sample)
                else:
                    bad.append({"key": samples.key(sample), "reason": problem.reason, "error": problem.detail})
            tensors: list[dict[str, Tensor]] = [{} for _ in good]
            if make.moments is not None:
                _add_moments(config, samples, good, make.moments, make.features, tensors, error)
            if make.text is not None:
                _add_text(config, samples, good, make.text, tensors, error)
            for sample, stored in zip(good, tensors, strict=True):
                captions = samples.captions(sample)
                record = {**samples.meta(sample), "captions": [list(p) for p in zip(captions.texts, captions.weights)]}
                data = json_line(record, (",", ":")).encode()
                writer.add(samples.key(sample), {"json": data, MEMBER: safetensors.torch.save(stored)})
            if progress is not None:
                progress(len(ids))
    pairs = {name: [error.squares[name], error.lost[name]] for name in error.squares}
    told = {"shards": [asdict(s) for s in writer.shards], "text": [error.captions, error.text_bytes]}
    write(marker(out, part), {**told, "bad": bad, "error": pairs})


def _add_moments(
    config: EncodeConfig,
    samples: Samples,
    ids: list[int],
    moments: Moments,
    features: Features | None,
    tensors: list[dict[str, Tensor]],
    error: _Error,
) -> None:
    rows: list[list[Tensor]] = [[] for _ in ids]
    maps: list[list[Tensor]] = [[] for _ in ids]
    beside: list[dict[str, list[Tensor]]] = [{} for _ in ids]
    sizes: list[Tensor] = []
    corners: list[Tensor] = []
    for variant in range(config.variants):
        crops = flips = None
        if variant and config.crop == "random":
            crops = [_corner(config.seed, i, variant) for i in ids]
        if variant and config.flip:
            flips = [uniform(config.seed, i, f"cache flip {variant}") < 0.5 for i in ids]
        if ids:
            pictures = samples.crop(ids, crops, flips)
            sizes.append(torch.from_numpy(pictures.original_size))
            corners.append(torch.from_numpy(pictures.crop_top_left))
            if variant and crops is None and flips is None:  # its random masks alone are other ones
                for kept in (*rows, *maps):
                    kept += kept[:1]
            else:
                images = to_float(pictures.pixels)
                for row, value in zip(rows, moments(images), strict=True):
                    row.append(error.store("moments", value, _DTYPES[config.dtype]))
                for row, value in zip(maps, () if features is None else features(images), strict=features is not None):
                    row.append(error.store("features", value, torch.float16))
            _add_pairs(config, pictures, ids, variant, moments, beside, error)
    for i, (row, stored) in enumerate(zip(rows, tensors, strict=True)):
        stored["moments"] = torch.stack(row)
        stored["original_size"] = torch.stack([s[i] for s in sizes])
        stored["crop_top_left"] = torch.stack([c[i] for c in corners])
        if features is not None:
            stored["features"] = torch.stack(maps[i])
        stored.update({name: torch.stack(rows) for name, rows in beside[i].items()})


def _add_pairs(
    config: EncodeConfig,
    pictures: Crops,
    ids: list[int],
    variant: int,
    moments: Moments,
    beside: list[dict[str, list[Tensor]]],
    error: _Error,
) -> None:
    """A variant's partners, as latents or as uint8, to the rows of their samples."""

    def draw(row: int, purpose: str) -> float:
        return uniform(config.seed, ids[row], f"cache {variant} {purpose}")

    made = make(config.pairs, pictures.pixels, pictures.partners, draw)
    for name, pair in config.pairs.items():
        key, values = cached_name(name, pair), made[name]
        if pair.cache == "latents":
            values = moments(delivered(pair, values).mul_(2.0).sub_(1.0))
            values = torch.stack([error.store(key, value, _DTYPES[config.dtype]) for value in values])
        for rows, value in zip(beside, values, strict=True):
            rows.setdefault(key, []).append(value)


def _corner(seed: int, sample: int, variant: int) -> tuple[float, float]:
    return uniform(seed, sample, f"cache crop {variant} x"), uniform(seed, sample, f"cache crop {variant} y")


def _add_text(
    config: EncodeConfig,
    samples: Samples,
    ids: list[int],
    text: TextStates,
    tensors: list[dict[str, Tensor]],
    error: _Error,
) -> None:
    worded = [[with_trigger(t, config.trigger) for t in samples.captions(i).texts] for i in ids]
    texts = [[filled(config.template, t, samples.meta(i)) for t in own] for i, own in zip(ids, worded, strict=True)]
    flat = [t for sample in texts for t in sample]
    # One call for a sample would waste the tower; one for all may be many times the batch.
    chunks = [text(flat[i : i + config.batch]) for i in range(0, len(flat), config.batch)]
    names = list(chunks[0]) if chunks else []
    for name in names:
        states = error.store(name, torch.cat([c[name] for c in chunks]), _DTYPES[config.dtype])
        first = 0
        for sample, stored in zip(texts, tensors, strict=True):
            stored[name] = states[first : first + len(sample)].clone()
            first += len(sample)
    for stored in tensors:
        stored.update(trimmed(stored))
        error.text_bytes += sum(stored[name].nbytes for name in names)
    error.captions += len(flat)
