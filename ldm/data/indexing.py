"""Manifest and offset indexes for tars that exist already, such as img2dataset's, in one parallel pass."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.data.buckets import BucketConfig, Shape, assign
from ldm.data.buckets import name as bucket_name
from ldm.data.decode import IMAGES, BadSample, image_member, metadata, upright_size
from ldm.data.filters import absent, compile_filter, names
from ldm.data.manifest import NAME, Manifest, Shard, sha256
from ldm.data.shards import Index, LocalReader, scan
from ldm.data.tables import rows as rows_of
from ldm.data.tables import table_of


@dataclass(frozen=True)
class Indexed:
    """One tar's result: its shard unless it was unusable, how many samples a filter left out, and what was wrong.

    `sizes` are (width, height) of the kept samples, if asked for.
    """

    shard: Shard | None
    left_out: int
    problems: tuple[str, ...]
    sizes: tuple[Shape, ...] = ()


def index(
    folder: Path,
    *,
    split: str = "train",
    where: str | None = None,
    name: str | None = None,
    buckets: BucketConfig | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Manifest, list[Indexed]]:
    """Index the tars of a folder (also in folders below it) and write the manifest there.

    `where` is a filter expression over each sample's json, over which go the fields of the parquet beside the tar, and
    "aspect", the width over the height. Damaged tars are reported, not fatal; the whole samples of a
    truncated one are kept. With `buckets` each tar gets one index a bucket; the tar is not changed. What an earlier
    manifest says of a tar's split and bucket stays. Raises ValueError if there is no usable tar.
    """
    if not folder.is_dir():
        raise ValueError(f"data {str(folder)!r}: no such folder")
    if where is not None:
        compile_filter(where)
    tars = sorted(p for p in folder.rglob("*.tar") if not p.name.startswith("."))
    if not tars:
        raise ValueError(f"data {str(folder)!r}: no .tar in it")
    jobs = [(folder, path, split, where, buckets is not None) for path in tars]
    results: list[Indexed] = []
    if workers == 1 or len(tars) == 1:
        for job in jobs:
            results.append(_index_one(job))
            if progress is not None:
                progress(len(results), len(tars))
    else:
        context = multiprocessing.get_context("forkserver")
        ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
        with ProcessPoolExecutor(min(workers, len(tars)), mp_context=context, **ignore) as pool:
            try:
                for result in pool.map(_index_one, jobs):
                    results.append(result)
                    if progress is not None:
                        progress(len(results), len(tars))
            except BaseException:  # Ctrl-C does not wait for the tars that nobody has begun
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    shards = tuple(r.shard for r in results if r.shard is not None and r.shard.samples)
    if not shards:
        problems = [p for r in results for p in r.problems][:3] or ["the filter kept nothing"]
        raise ValueError(f"data {str(folder)!r}: no usable sample in {len(tars)} tars: {'; '.join(problems)}")
    notes: dict[str, Any] = {"where": where} if where else {}
    if buckets is not None:
        shards, notes["buckets"] = _into_buckets(folder, results, buckets)
    manifest = _manifest(folder, shards, name, notes)
    manifest.write()
    return manifest, results


def _manifest(folder: Path, shards: tuple[Shard, ...], name: str | None, notes: dict[str, Any]) -> Manifest:
    """With what an earlier manifest says of the same shards and tars cannot tell: split, bucket, repeats, the cache."""
    if not (folder / NAME).is_file():
        return Manifest(name=name or folder.resolve().name, shards=shards, folder=folder, notes=notes)
    old = Manifest.read(folder)
    known = {s.file: s for s in old.shards}
    several = len(known) < len(old.shards)  # made with indexes by bucket, which this replaces

    def told(shard: Shard) -> Shard:
        if (k := known.get(shard.file)) is None:
            return shard
        bucket = shard.bucket or (None if several else k.bucket)
        return replace(shard, split=k.split, bucket=bucket, repeats=k.repeats)

    kept = {k: v for k, v in old.notes.items() if k != "buckets" or not several}
    return replace(old, name=name or old.name, shards=tuple(told(s) for s in shards), notes={**kept, **notes})


def _into_buckets(
    folder: Path, results: list[Indexed], config: BucketConfig
) -> tuple[tuple[Shard, ...], dict[str, dict[str, object]]]:
    """Each tar's index divided by bucket, as `TAR.WIDTHxHEIGHT.index`, and the report of what was merged."""
    sizes = {f"{t} {i}": size for t, r in enumerate(results) for i, size in enumerate(r.sizes)}
    assigned = assign(sizes, config)
    shards: list[Shard] = []
    for number, result in enumerate(results):
        if result.shard is None:
            continue
        whole = Index.read(folder / result.shard.index)
        rows: dict[Shape, list[int]] = {}
        for i in range(len(result.sizes)):
            rows.setdefault(assigned.bucket[f"{number} {i}"], []).append(i)
        for bucket, chosen in sorted(rows.items()):
            place = Path(result.shard.index).with_suffix(f".{bucket_name(bucket)}.index")
            whole.take(chosen).write(folder / place)
            shards.append(replace(result.shard, index=str(place), samples=len(chosen), bucket=bucket))
        (folder / result.shard.index).unlink()
    return tuple(shards), assigned.report()


def _index_one(job: tuple[Path, Path, str, str | None, bool]) -> Indexed:
    folder, path, split, where, measure = job
    relative = os.path.relpath(path, folder)
    try:
        found = scan(path)
    except (ValueError, OSError) as error:
        return Indexed(None, 0, (f"{relative}: {error}",))
    problems = []
    if path.stat().st_size % 512 or not _ended(path):
        problems.append(f"{relative}: truncated after {len(found)} whole samples")
    without = sum(1 for row in found.offsets if not _has_picture(found, row))
    if without:
        problems.append(f"{relative}: {without} samples without a picture")
    kept = found
    if where is not None:
        kept, bad, seen = _filter(path, found, where)
        problems += [f"{relative}: no sample has the field {field}" for field in absent(where, seen)]
        if bad:
            problems.append(f"{relative}: {bad} samples with json that does not parse")
    sizes: tuple[Shape, ...] = ()
    if measure:
        kept, sizes, bad = _measure(path, kept)
        if bad:
            problems.append(f"{relative}: {bad} samples whose picture has no size")
    place = path.with_suffix(".index")
    kept.write(place)
    shard = Shard(
        file=relative,
        samples=len(kept),
        bytes=path.stat().st_size,
        sha256=sha256(path),
        index=os.path.relpath(place, folder),
        split=split,
    )
    return Indexed(shard, len(found) - len(kept), tuple(problems), sizes)


def _ended(path: Path) -> bool:
    """Whether the file ends with a zero block, as whole tars do."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 512, 0))
        return not any(file.read(512))


def _has_picture(found: Index, row: object) -> bool:
    offsets = list(row)  # pyright: ignore[reportArgumentType]
    known = (*IMAGES, "cache.safetensors")
    return any(o >= 0 and e in known for e, o in zip(found.extensions, offsets, strict=True))


def _filter(path: Path, found: Index, where: str) -> tuple[Index, int, set[str]]:
    """The samples that the filter keeps, how many have json that does not parse, and the fields that there are."""
    keep = compile_filter(where)
    reader = LocalReader(str(path), found, os.open(path, os.O_RDONLY))
    table = _table(path, reader, where)
    rows, bad, seen = [], 0, {"aspect"}
    for i in range(len(found)):
        try:
            fields = metadata(reader.read(i, only=("json",)))
        except BadSample:
            bad += 1
            continue
        fields |= table.get(os.path.basename(found.keys[i]), {})
        width, height = fields.get("width"), fields.get("height")
        if isinstance(width, int) and isinstance(height, int) and height:
            fields.setdefault("aspect", width / height)
        seen |= fields.keys()
        if keep(fields):
            rows.append(i)
    return found.take(rows), bad, seen


def _table(path: Path, reader: LocalReader, where: str) -> dict[str, dict[str, Any]]:
    """The fields of the tar's parquet, unless there is none or the first sample's json tells all that is asked for."""
    place = table_of(path)
    if place is None:
        return {}
    known: dict[str, Any] = {}
    with contextlib.suppress(BadSample):
        known = metadata(reader.read(0, only=("json",))) if len(reader) else {}
    if names(where) <= {*known, "aspect"}:
        return {}
    return rows_of(place)


def _measure(path: Path, found: Index) -> tuple[Index, tuple[Shape, ...], int]:
    """The samples whose picture's header tells a size, the sizes, and how many do not."""
    reader = LocalReader(str(path), found, os.open(path, os.O_RDONLY))
    rows, sizes = [], []
    for i in range(len(found)):
        with contextlib.suppress(BadSample):
            sizes.append(upright_size(image_member(reader.read(i, only=IMAGES))))
            rows.append(i)
    return found.take(rows), tuple(sizes), len(found) - len(rows)


def quarantine(folder: Path, results: list[Indexed]) -> Path:
    """Write what was wrong, one json line each."""
    path = folder / "quarantine.jsonl"
    lines = [json.dumps({"error": p}, ensure_ascii=False) + "\n" for r in results for p in r.problems]
    path.write_text("".join(lines), encoding="utf-8")
    return path
