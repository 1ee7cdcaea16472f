"""Manifest and offset indexes for tars that exist already, such as img2dataset's, in one parallel pass."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.data import tables
from ldm.data.buckets import BucketConfig, Shape, assign
from ldm.data.buckets import name as bucket_name
from ldm.data.decode import IMAGES, BadSample, image_member, metadata, upright_size
from ldm.data.filters import absent, compile_filter, names
from ldm.data.formats import UNREAD
from ldm.data.manifest import NAME, Manifest, Shard, bucket_report, json_line, sha256
from ldm.data.offsets import Index
from ldm.data.remote import Remote, RemoteConfig, RemoteDamage, is_remote
from ldm.data.scan import CACHED, NotTar, scan
from ldm.data.shards import LocalReader
from ldm.data.tars import Tar, find

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_MOST_KEYS = 20_000_000


@dataclass(frozen=True)
class Indexed:
    """One tar's result: its shard unless it was unusable, how many samples a filter left out, and what was wrong.

    `reasons` has a word for each of the problems. `pictures` are the kept samples that have one, `sizes` (width,
    height) of the kept samples, if asked for, `hashes` (n,) of the keys.
    """

    shard: Shard | None
    left_out: int
    problems: tuple[str, ...]
    sizes: tuple[Shape, ...] = ()
    reasons: tuple[str, ...] = ()
    pictures: int = 0
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64), compare=False, repr=False)


@dataclass(frozen=True)
class _Job:
    tar: Tar
    out: Path
    split: str
    where: str | None
    measure: bool
    remote: RemoteConfig


def index(
    folder: Path | str,
    *,
    out: Path | None = None,
    split: str = "train",
    where: str | None = None,
    name: str | None = None,
    buckets: BucketConfig | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    remote: RemoteConfig | None = None,
) -> tuple[Manifest, list[Indexed]]:
    """Index the tars of a folder (also in folders below it) or address; manifest and indexes go there or into `out`.

    `where` is a filter expression over each sample's json, over which go the fields of the parquet beside the tar, and
    "aspect", the width over the height. Damaged tars are reported, not fatal; the whole samples of a
    truncated one are kept. With `buckets` each tar gets one index a bucket; the tar is not changed. What an earlier
    manifest says of a tar's split and bucket stays. Far tars stay where they are and are read once. Raises ValueError
    if there is no usable tar, no sample has a picture, or the folder cannot be written.
    """
    if where is not None:
        compile_filter(where)
    config = remote or RemoteConfig()
    tars, odd = find(folder, out, Remote(config))
    out = Path(folder) if out is None else out
    _check_writable(out, {(out / t.index).parent for t in tars})
    jobs = [_Job(tar, out, split, where, buckets is not None, config) for tar in tars]
    results = [Indexed(None, 0, (problem,), reasons=("compressed",)) for problem in odd]
    for number, result in enumerate(_results(jobs, workers), 1):
        results.append(result)
        if progress is not None:
            progress(number, len(jobs))
    results += _gone(out, {t.file for t in tars})
    shards = tuple(r.shard for r in results if r.shard is not None and r.shard.samples)
    if not shards:
        problems = [p for r in results for p in r.problems][:3] or ["the filter kept nothing"]
        raise ValueError(f"data {str(folder)!r}: no usable sample in {len(tars)} tars: {'; '.join(problems)}")
    if not any(r.pictures for r in results):
        samples = sum(s.samples for s in shards)
        raise ValueError(
            f"data {str(folder)!r}: none of the {samples} samples in {len(shards)} tars has a picture; "
            f"a picture's extension is one of {', '.join(IMAGES)}, all that follows the first dot of its name"
        )
    notes: dict[str, Any] = {"where": where} if where else {}
    if buckets is not None:
        shards, notes["buckets"] = _into_buckets(out, results, buckets)
    manifest = _manifest(out, shards, name, _name(folder, out), notes)
    manifest.write()
    return manifest, results


def _name(folder: Path | str, out: Path) -> str:
    return out.resolve().name if is_remote(str(folder)) else Path(folder).resolve().name


def _check_writable(out: Path, folders: set[Path]) -> None:
    """Make the folders. ValueError, before any work, if they cannot be written."""
    for folder in sorted({out, *folders}):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            raise ValueError(
                f"{str(folder)!r} cannot be written ({error.strerror}): `--out FOLDER` puts manifest and indexes "
                "elsewhere, and the tars stay where they are"
            ) from error


def _results(jobs: list[_Job], workers: int) -> Iterator[Indexed]:
    """Each job's result in order; a tar whose process dies is named and ends no other."""
    if workers == 1 or len(jobs) == 1:
        yield from map(_index_one, jobs)
        return
    done = 0
    while done < len(jobs):
        try:
            with _pool(min(workers, len(jobs))) as pool:
                try:
                    for result in pool.map(_index_one, jobs[done:]):
                        done += 1
                        yield result
                except (KeyboardInterrupt, GeneratorExit):  # does not wait for the tars that nobody has begun
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        except BrokenProcessPool:
            try:
                with _pool(1) as pool:
                    result = pool.submit(_index_one, jobs[done]).result()
            except BrokenProcessPool:
                result = _unusable(jobs[done], "crashed", "the process that read it died")
            done += 1
            yield result


def _pool(workers: int) -> ProcessPoolExecutor:
    ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}  # Ctrl-C is the parent's
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver"), **ignore)


def _gone(out: Path, files: set[str]) -> list[Indexed]:
    """The tars of an earlier manifest that are not there any more."""
    if not (out / NAME).is_file():
        return []
    gone = sorted({s.file for s in Manifest.read(out).shards} - files)
    return [Indexed(None, 0, (f"{f}: in the earlier manifest, not here any more",), reasons=("missing",)) for f in gone]


def _manifest(
    folder: Path, shards: tuple[Shard, ...], name: str | None, default: str, notes: dict[str, Any]
) -> Manifest:
    """With what an earlier manifest says of the same shards and tars cannot tell: split, bucket, repeats, the cache."""
    if not (folder / NAME).is_file():
        return Manifest(name=name or default, shards=shards, folder=folder, notes=notes)
    old = Manifest.read(folder)
    known = {s.file: s for s in old.shards}
    several = len(known) < len(old.shards)  # made with indexes by bucket, which this replaces

    def told(shard: Shard) -> Shard:
        if (k := known.get(shard.file)) is None:
            return shard
        bucket = shard.bucket or (None if several else k.bucket)
        return replace(shard, split=k.split, bucket=bucket, repeats=k.repeats)

    kept = {k: v for k, v in old.notes.items() if k not in ("buckets", "where")}
    shards = tuple(told(s) for s in shards)
    if any(s.bucket for s in shards):
        notes = {**notes, "buckets": bucket_report(shards, notes.get("buckets") or old.notes.get("buckets") or {})}
    return replace(old, name=name or old.name, shards=shards, notes={**kept, **notes})


def _into_buckets(
    folder: Path, results: list[Indexed], config: BucketConfig
) -> tuple[tuple[Shard, ...], dict[str, dict[str, object]]]:
    """Each tar's index divided by bucket, as `TAR.WIDTHxHEIGHT.index`, and the report of what was merged."""
    sizes = {f"{t} {i}": size for t, r in enumerate(results) for i, size in enumerate(r.sizes)}
    assigned = assign(sizes, config)
    shards: list[Shard] = []
    for number, result in enumerate(results):
        if result.shard is None or not result.shard.samples:
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


def _index_one(job: _Job) -> Indexed:
    try:
        with _at_hand(job) as path:
            return _indexed(job, path)
    except NotTar as error:
        return _unusable(job, "not_a_tar", error.what)
    except (ValueError, OSError) as error:
        if isinstance(error, tables.MissingLibrary) or (isinstance(error, OSError) and error.errno in _FULL):
            raise
        return _unusable(job, "unreadable", str(getattr(error, "strerror", None) or error))


def _unusable(job: _Job, reason: str, said: str) -> Indexed:
    return Indexed(None, 0, (f"{job.tar.name}: {said}",), reasons=(reason,))


@contextlib.contextmanager
def _at_hand(job: _Job) -> Iterator[Path]:
    """The tar, or a copy of a far one that is gone afterwards."""
    if not is_remote(job.tar.place):
        yield Path(job.tar.place)
        return
    with tempfile.TemporaryDirectory(dir=job.out, prefix=".fetched-") as folder:
        path = Path(folder) / "copy.tar"
        remote = Remote(job.remote)
        remote.copy(job.tar.place, path)
        if job.where is not None:
            with contextlib.suppress(RemoteDamage):  # there is none
                remote.copy(f"{job.tar.place[:-4]}.parquet", path.with_suffix(".parquet"))
        yield path


def _indexed(job: _Job, path: Path) -> Indexed:
    found = scan(path)
    problems = list(found.problems)
    everything = kept = found.index
    if without := len(kept) - int(_with_picture(kept).sum()):
        other = sorted({UNREAD[e] for e in kept.extensions if e in UNREAD})
        what = f"; there are members of {', '.join(other)}, which is not read here" if other else ""
        problems.append(("no_picture", f"{without} samples without a picture{what}"))
    left_out = 0
    if job.where is not None:
        kept, bad, odd = _filter(job, path, kept)
        left_out = len(everything) - len(kept) - bad
        problems += odd
        if bad:
            problems.append(("bad_json", f"{bad} samples with json that does not parse are left out"))
    sizes: tuple[Shape, ...] = ()
    if job.measure:
        kept, sizes, bad = _measure(path, kept)
        if bad:
            problems.append(("no_size", f"{bad} samples whose picture has no size are left out"))
    kept.write(job.out / job.tar.index)
    shard = Shard(
        file=job.tar.file,
        samples=len(kept),
        bytes=path.stat().st_size,
        sha256=sha256(path),
        index=job.tar.index,
        split=job.split,
        rows=kept.digest(),
    )
    return Indexed(
        shard,
        left_out,
        tuple(f"{job.tar.name}: {said}" for _, said in problems),
        sizes,
        tuple(reason for reason, _ in problems),
        int(_with_picture(kept).sum()),
        _hashes(kept),
    )


def _with_picture(index: Index) -> NDArray[np.bool_]:
    return index.having((*IMAGES, CACHED))


def _hashes(index: Index) -> NDArray[np.uint64]:
    found = [hashlib.blake2b(index.names.raw(i), digest_size=8).digest() for i in range(len(index))]
    return np.frombuffer(b"".join(found), np.uint64)


def _filter(job: _Job, path: Path, found: Index) -> tuple[Index, int, list[tuple[str, str]]]:
    """The samples that are kept, how many have json that does not parse, and what was odd: parquet, absent fields."""
    assert job.where is not None
    keep = compile_filter(job.where)
    reader = LocalReader(str(path), found, os.open(path, os.O_RDONLY))
    odd: list[tuple[str, str]] = []
    table = _table(job.where, path, reader, odd)
    rows, bad, met, seen = [], 0, 0, {"aspect"}
    for i in range(len(found)):
        try:
            fields = metadata(reader.read(i, only=("json",)))
        except (ValueError, RecursionError):  # BadSample, and what a parser makes of nested or endless numbers
            bad += 1
            continue
        own = table.get(os.path.basename(found.key(i)))
        met += own is not None
        fields |= own or {}
        width, height = fields.get("width"), fields.get("height")
        if isinstance(width, (int, float)) and isinstance(height, (int, float)) and height:
            fields.setdefault("aspect", width / height)
        seen |= fields.keys()
        if keep(fields):
            rows.append(i)
    if table and not met and len(found):
        odd.append(("bad_table", "the parquet beside it has none of its keys; its fields count as missing"))
    odd += [("no_field", f"no sample has the field {field}") for field in absent(job.where, seen)]
    return found.take(rows), bad, odd


def _table(where: str, path: Path, reader: LocalReader, odd: list[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """The fields of the tar's parquet, unless there is none or the first sample's json tells all that is asked for."""
    place = tables.table_of(path)
    if place is None:
        return {}
    known: dict[str, Any] = {}
    with contextlib.suppress(ValueError, RecursionError):
        known = metadata(reader.read(0, only=("json",))) if len(reader) else {}
    if names(where) <= {*known, "aspect"}:
        return {}
    try:
        return tables.rows(place)
    except tables.MissingLibrary:
        raise
    except ValueError as error:
        odd.append(("bad_table", f"{str(error).replace(str(place), place.name)}; its fields count as missing"))
        return {}


def _measure(path: Path, found: Index) -> tuple[Index, tuple[Shape, ...], int]:
    """The samples whose picture's header tells a size, the sizes, and how many do not."""
    reader = LocalReader(str(path), found, os.open(path, os.O_RDONLY))
    rows, sizes = [], []
    for i in range(len(found)):
        with contextlib.suppress(BadSample):
            sizes.append(upright_size(image_member(reader.read(i, only=IMAGES))))
            rows.append(i)
    return found.take(rows), tuple(sizes), len(found) - len(rows)


def repeated(results: list[Indexed]) -> str | None:
    """A sentence if keys come in more than one tar; of very many samples it is not looked for."""
    told = [r for r in results if r.shard is not None]
    if sum(len(r.hashes) for r in told) > _MOST_KEYS:
        return None
    each = [np.unique(r.hashes) for r in told]
    values, counts = np.unique(np.concatenate([*each, np.zeros(0, np.uint64)]), return_counts=True)
    again = values[counts > 1]
    if not len(again):
        return None
    tars = [r.shard.file for r, own in zip(told, each, strict=True) if r.shard is not None and again[0] in own]
    return f"{len(again)} keys come in more than one tar (as in {tars[0]} and {tars[1]}); each is a sample of its own"


def quarantine(folder: Path, results: list[Indexed]) -> Path:
    """Write what was wrong with tars, one json line each, beside what a build wrote there of pictures."""
    path = folder / "quarantine.jsonl"
    kept = []
    if path.is_file():
        kept = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if '"name": ' in line]
    for result in results:
        for problem, reason in zip(result.problems, result.reasons, strict=True):
            shard, _, error = problem.partition(": ")
            kept.append(json_line({"shard": shard, "reason": reason, "error": error}))
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return path
