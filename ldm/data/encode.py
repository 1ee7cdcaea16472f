"""Caches of unscaled posterior moments and text hidden states in shards; knows no model.

The work is cut into parts of consecutive samples; each part becomes one tar and a marker that names its shard. Any
number of processes may share the parts, be killed and started again: a part is whole or absent. `finish` makes the
manifest when no part is missing.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from ldm.data.buckets import name as bucket_name
from ldm.data.cache import MEMBER
from ldm.data.captions import uniform
from ldm.data.images import Fit, to_float
from ldm.data.manifest import Manifest, Shard, resolve, shard_of
from ldm.data.samples import Samples
from ldm.data.write import ShardWriter

Moments = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [-1, 1] -> unscaled posterior moments (B, 2Z, h, w)."""

TextStates = Callable[[list[str]], dict[str, Tensor]]
"""Texts -> "text" (B, T, D) and optionally "pooled" (B, P)."""

_SETTINGS = "cache.json"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What is cached. `variants` pictures a sample are drawn by crop and flip (the first is plain).

    With `buckets` pictures have the shapes of the data set's buckets, and `size` is not used.
    """

    path: str
    splits: tuple[str, ...] = ("train",)
    size: int = 64
    buckets: bool = False
    fit: Fit = "crop"
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    variants: int = 1
    template: str = "{}"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    seed: int = 0
    batch: int = 64
    part: int = 2048

    def __post_init__(self) -> None:
        if min(self.size, self.variants, self.batch, self.part) < 1:
            raise ValueError("size, variants, batch and part must be at least 1")
        if self.variants > 1 and self.crop == "center" and not self.flip:
            raise ValueError(f"variants: {self.variants} would all be equal with crop=center and flip=false")
        if "{}" not in self.template:
            raise ValueError(f"template {self.template!r} must hold {{}} where the caption goes")


@dataclass
class _Part:
    split: str
    number: int
    start: int
    stop: int
    bucket: tuple[int, int] | None
    repeats: int

    @property
    def prefix(self) -> str:
        return f"{self.split}-p{self.number:05d}"


@dataclass
class _Error:
    """Sums of squares of the values and of what storing them lost, by tensor name."""

    squares: dict[str, float] = field(default_factory=dict)
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
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write this rank's missing parts into `out`; `hashes` names the weights, as in {"vae": ..., "text": ...}.

    Raises ValueError if `out` holds parts made with other settings. Bad samples are left out; `finish` lists
    them.
    """
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, _settings(config, moments is not None, text is not None, hashes))
    manifest = Manifest.read(resolve(config.path))
    for split in config.splits:
        samples = Samples(manifest, split, size=config.size, fit=config.fit, buckets=config.buckets, memory=0)
        for part in _parts(config, manifest, split):
            if part.number % world == rank and not _marker(out, part).is_file():
                _encode_part(config, out, part, samples, moments, text, progress)
            elif part.number % world == rank and progress is not None:
                progress(part.stop - part.start)


def finish(config: EncodeConfig, out: Path) -> Manifest:
    """The manifest over all parts, written, and `quarantine.jsonl`; ValueError names a part that is missing."""
    settings = json.loads((out / _SETTINGS).read_text())
    source = Manifest.read(resolve(config.path))
    shards: list[Shard] = []
    sums: dict[str, list[float]] = {}
    bad: list[dict[str, str]] = []
    for split in config.splits:
        for part in _parts(config, source, split):
            marker = _marker(out, part)
            if not marker.is_file():
                raise ValueError(f"cache {str(out)!r}: part {part.prefix} is missing; run the same encoding again")
            tree = json.loads(marker.read_text())
            shards += [shard_of(entry) for entry in tree["shards"]]
            bad += tree["bad"]
            for name, pair in tree["error"].items():
                have = sums.setdefault(name, [0.0, 0.0])
                sums[name] = [have[0] + pair[0], have[1] + pair[1]]
    total = sum(s.samples for s in shards)
    notes: dict[str, Any] = {
        "bad": len(bad),
        "bytes_per_sample": round(sum(s.bytes for s in shards) / max(total, 1)),
        "relative_rms_error": {k: (b / a) ** 0.5 if a else 0.0 for k, (a, b) in sorted(sums.items())},
    }
    if config.buckets:
        notes["buckets"] = _bucket_report(shards, source.notes.get("buckets", {}))
    result = Manifest(
        name=f"{source.name}-cached", shards=tuple(shards), folder=out, cached=settings["cached"], notes=notes
    )
    result.write()
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in bad]
    (out / "quarantine.jsonl").write_text("".join(lines), encoding="utf-8")
    return result


def missing(config: EncodeConfig, out: Path) -> int:
    """How many parts other processes still have to write."""
    source = Manifest.read(resolve(config.path))
    parts = (p for split in config.splits for p in _parts(config, source, split))
    return sum(not _marker(out, part).is_file() for part in parts)


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


def _settings(config: EncodeConfig, moments: bool, text: bool, hashes: Mapping[str, str]) -> dict[str, Any]:
    cached = {
        "size": None if config.buckets else config.size,
        "fit": config.fit,
        "crop": config.crop,
        "flip": config.flip,
        "variants": config.variants,
        "template": config.template,
        "dtype": config.dtype,
        "moments": moments,
        "text_states": text,
        **dict(sorted(hashes.items())),
        **({"buckets": True} if config.buckets else {}),
    }
    source = Manifest.read(resolve(config.path))
    content = sorted(s.sha256 for split in config.splits for s in source.split(split))
    return {"cached": cached, "seed": config.seed, "part": config.part, "source": content}


def _claim(out: Path, settings: dict[str, Any]) -> None:
    path = out / _SETTINGS
    if path.is_file():
        have = json.loads(path.read_text())
        for key in sorted({*have, *settings} - {"cached"}):
            if have.get(key) != settings.get(key):
                raise ValueError(f"cache {str(out)!r} was begun with another {key}; choose another folder")
        for key in sorted({*have["cached"], *settings["cached"]}):
            if have["cached"].get(key) != settings["cached"].get(key):
                raise ValueError(
                    f"cache {str(out)!r} was begun with {key}={have['cached'].get(key)!r}, not "
                    f"{settings['cached'].get(key)!r}; choose another folder"
                )
        return
    _write(path, settings)


def _write(path: Path, tree: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(tree, indent=1))
    os.replace(beside, path)


def _parts(config: EncodeConfig, source: Manifest, split: str) -> list[_Part]:
    """Runs of shards of one shape and number of repeats, each cut into parts."""
    parts: list[_Part] = []
    start = 0
    shards = source.split(split)
    for (bucket, repeats), run in itertools.groupby(
        shards, lambda s: (s.bucket if config.buckets else None, s.repeats)
    ):
        stop = start + sum(s.samples for s in run)
        for first in range(start, stop, config.part):
            parts.append(_Part(split, len(parts), first, min(first + config.part, stop), bucket, repeats))
        start = stop
    return parts


def _bucket_report(shards: list[Shard], merged: dict[str, Any]) -> dict[str, Any]:
    """As a build's: by bucket the pictures kept, and what the source had merged into it."""
    counts: Counter[str] = Counter()
    for shard in shards:
        counts[bucket_name(shard.bucket) if shard.bucket else "none"] += shard.samples
    return {b: {"pictures": n, "merged": merged.get(b, {}).get("merged", {})} for b, n in sorted(counts.items())}


def _marker(out: Path, part: _Part) -> Path:
    return out / f"{part.prefix}.done.json"


def _encode_part(
    config: EncodeConfig,
    out: Path,
    part: _Part,
    samples: Samples,
    moments: Moments | None,
    text: TextStates | None,
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
            if moments is not None:
                _add_moments(config, samples, good, moments, tensors, error)
            if text is not None:
                _add_text(config, samples, good, text, tensors, error)
            for sample, stored in zip(good, tensors, strict=True):
                captions = samples.captions(sample)
                record = {**samples.meta(sample), "captions": [list(p) for p in zip(captions.texts, captions.weights)]}
                data = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
                writer.add(samples.key(sample), {"json": data, MEMBER: safetensors.torch.save(stored)})
            if progress is not None:
                progress(len(ids))
    pairs = {name: [error.squares[name], error.lost[name]] for name in error.squares}
    _write(_marker(out, part), {"shards": [asdict(s) for s in writer.shards], "bad": bad, "error": pairs})


def _add_moments(
    config: EncodeConfig,
    samples: Samples,
    ids: list[int],
    moments: Moments,
    tensors: list[dict[str, Tensor]],
    error: _Error,
) -> None:
    rows: list[list[Tensor]] = [[] for _ in ids]
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
            encoded = moments(to_float(pictures.pixels))
            for row, value in zip(rows, encoded, strict=True):
                row.append(error.store("moments", value, _DTYPES[config.dtype]))
    for i, (row, stored) in enumerate(zip(rows, tensors, strict=True)):
        stored["moments"] = torch.stack(row)
        stored["original_size"] = torch.stack([s[i] for s in sizes])
        stored["crop_top_left"] = torch.stack([c[i] for c in corners])


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
    texts = [[config.template.replace("{}", t) for t in samples.captions(i).texts] for i in ids]
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
