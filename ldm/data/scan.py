"""One pass over the headers of a tar, whatever strangers put into it: which samples it holds, and what was odd."""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ldm.data.formats import IMAGES, passed_over
from ldm.data.offsets import Index, index_of

CACHED = "cache.safetensors"
_BLOCK = 512
_NAMES = "utf-8"
_APART = (
    "lie apart; they are put together here, but who reads the tar in order meets samples without a picture "
    "(`tar --sort=name` packs them side by side)"
)
_META = re.compile(r"__[^/]*__(/|$)")
_PACKED = "; {} it: members of a compressed tar cannot be read one at a time"
_MAGIC = (
    (b"\x1f\x8b", "compressed with gzip" + _PACKED.format("`gunzip`")),
    (b"BZh", "compressed with bzip2" + _PACKED.format("`bunzip2`")),
    (b"\xfd7zXZ", "compressed with xz" + _PACKED.format("`unxz`")),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd" + _PACKED.format("`unzstd`")),
    (b"PK\x03\x04", "a zip file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file; `git lfs pull` fetches it"),
    (b"<", "a page (HTML or XML), as a server sends it instead of a file: fetch it again"),
    (b"{", "text in JSON, as a server sends it instead of a file: fetch it again"),
)


class NotTar(ValueError):
    """A file that is no plain tar; `what` says what it is or lacks."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"shard {str(path)!r} is not a plain tar: {what}")
        self.what = f"not a plain tar: {what}"


@dataclass
class Scan:
    """What a tar holds and what was odd about it: `problems` are (reason, sentence), the reason a word to count by."""

    index: Index
    problems: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class _Walk:
    """What the headers said, in their order: (name, offset, size) of files that count and of `others`."""

    files: list[tuple[str, int, int]] = field(default_factory=list)
    others: list[tuple[str, int, int]] = field(default_factory=list)
    links: list[tuple[int, str, str]] = field(default_factory=list)  # (place among the files, name, target)
    hidden: list[str] = field(default_factory=list)
    sparse: list[str] = field(default_factory=list)
    cut: str | None = None  # the member that the file ends in, "" in a header
    damaged: int = 0
    ended: bool = False


def scan(path: Path) -> Scan:
    """The samples of a plain tar: members with one key, wherever in it they lie, in the order of their first ones.

    The key is the path up to the first dot of the base name, the extension (lower) the rest, as in WebDataset. Hidden
    files do not count; links are followed inside the tar; past damage it goes on with the next whole header. Of a tar
    that is cut short the whole samples are kept. Raises NotTar for a file that is none.
    """
    with path.open("rb") as file:
        walk = _walk(path, file)
    files, dangling = _with_links(walk)
    rows, again, apart = _grouped(files)
    problems: list[tuple[str, str]] = []
    if walk.cut is not None or not walk.ended:
        rows, lost = _without_the_cut(rows, walk.cut)
        problems.append(("truncated", f"truncated after {len(rows)} whole samples" + (f", {lost} cut" if lost else "")))
    if walk.damaged:
        problems.append(("damaged", f"damaged headers, whose members are left out: {walk.damaged}"))
    if not rows and not problems:
        problems.append(("empty", "no samples in it"))
    if apart:
        problems.append(("apart", f"members of {apart} samples {_APART}"))
    for names, reason, what in (
        (walk.sparse, "sparse", "sparse files, which cannot be read at a place (pack without --sparse)"),
        (dangling, "link", "links to what is not in the tar"),
        (walk.hidden, "hidden", "hidden files left out"),
        (again, "duplicate", "keys that come more than once, each a sample of its own"),
    ):
        if names:
            problems.append((reason, f"{what}: {len(names)}, such as {names[0][:100]!r}"))
    return Scan(index_of(rows), problems)


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key is the path up to the first dot of the base name, the extension (lower) the rest."""
    base = posixpath.basename(name)
    stem, _, extension = base.partition(".")
    return name[: len(name) - len(base)] + stem, extension.lower()


def _refuse(path: Path, head: bytes) -> None:
    """Raise NotTar for a file whose first block is no header, saying what it looks like."""
    if not head:
        raise NotTar(path, "empty file")
    for magic, what in _MAGIC:
        if (head.lstrip() if magic in (b"<", b"{") else head).startswith(magic):
            raise NotTar(path, what)


def _walk(path: Path, file: BinaryIO) -> _Walk:
    length = path.stat().st_size
    found = _Walk()
    head = file.read(_BLOCK)
    try:
        tarfile.TarInfo.frombuf(head, _NAMES, "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError):
        _refuse(path, head)
    file.seek(0)
    try:
        # Past zeros and damage it looks for a first header, so that only a file without any is refused.
        tar = tarfile.TarFile(fileobj=file, mode="r", ignore_zeros=True, encoding=_NAMES, errors="surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise NotTar(path, str(error)) from error
    if next(iter(tar), None) is None:
        if any(head):
            raise NotTar(path, "no header of a member in it")
        found.ended = True
        return found
    tar.offset = place = 0
    spoiled = False
    while place < length:
        file.seek(place)
        here, member = place, None
        try:
            member = tarfile.TarInfo.fromtarfile(tar)
            place = tar.offset
        except (tarfile.TarError, ValueError, OverflowError) as error:
            zeros = type(error).__name__ == "EOFHeaderError"
            if here + _BLOCK > length:
                break
            found.damaged += spoiled and zeros
            found.ended, spoiled = zeros, not zeros
        if member is None or member.size < 0 or place <= here:
            spoiled |= member is not None
            place = here + _BLOCK
            continue
        found.damaged += spoiled
        found.ended = spoiled = False
        if not _note(found, member, length):
            return found
    if not found.ended:
        found.cut = ""
    return found


def _note(found: _Walk, member: tarfile.TarInfo, length: int) -> bool:
    """Take a member down; False if the file ends before it does."""
    name, where = member.name, (member.offset_data, member.size)
    sparse = member.issparse()
    if member.isfile() and not sparse and sum(where) > length:
        found.cut = name
        return False
    base = posixpath.basename(name)
    if member.islnk() or member.issym():
        target = member.linkname
        if member.issym() and not target.startswith("/"):
            target = posixpath.join(posixpath.dirname(name), target)
        if "." in base and not _META.match(name) and not passed_over(name):
            found.links.append((len(found.files), name, target))
    elif member.isfile():
        if "." not in base or _META.match(name):
            found.others.append((name, *where))
        elif passed_over(name):
            found.hidden.append(name)
            found.others.append((name, *where))
        elif sparse:
            found.sparse.append(name)
        else:
            found.files.append((name, *where))
    return True


def _with_links(walk: _Walk) -> tuple[list[tuple[str, int, int]], list[str]]:
    """The files with links in their places, read where the file lies that they name, and the links to nothing."""
    if not walk.links:
        return walk.files, []
    known = {posixpath.normpath(name): where for name, *where in (*walk.others, *walk.files)}
    further = {posixpath.normpath(name): posixpath.normpath(target) for _, name, target in walk.links}
    out: list[tuple[str, int, int]] = []
    dangling: list[str] = []
    taken = 0
    for place, name, target in walk.links:
        out += walk.files[taken:place]
        taken = place
        target = posixpath.normpath(target)
        seen: set[str] = set()
        while target not in known and target in further and target not in seen:  # a link to a link; not in a circle
            seen.add(target)
            target = further[target]
        if target in known:
            offset, size = known[target]
            out.append((name, offset, size))
        else:
            dangling.append(name)
    return out + walk.files[taken:], dangling


Rows = list[tuple[str, dict[str, tuple[int, int]]]]


def _grouped(files: Iterable[tuple[str, int, int]]) -> tuple[Rows, list[str], int]:
    """(key, members) in the order of each sample's first member, the keys that more than one sample has, and how many
    keys have samples whose members are no neighbours."""
    by_key: dict[str, list[tuple[int, dict[str, tuple[int, int]]]]] = {}
    last: str | None = None
    for number, (name, offset, size) in enumerate(files):
        key, extension = split_name(name)
        runs = by_key.setdefault(key, [])
        if not runs or last != key or extension in runs[-1][1]:
            runs.append((number, {}))
        runs[-1][1][extension] = (offset, size)
        last = key
    rows: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
    again: list[str] = []
    apart = 0
    for key, runs in by_key.items():
        samples = list(_samples(runs))
        rows += [(first, key, members) for first, members in samples]
        apart += samples != runs
        if len(samples) > 1:
            again.append(key)
    return [(key, members) for _, key, members in sorted(rows, key=lambda row: row[0])], again, apart


def _samples(runs: list[tuple[int, dict[str, tuple[int, int]]]]) -> Iterator[tuple[int, dict[str, tuple[int, int]]]]:
    """The samples of one key from its runs of neighbours.

    Runs that share no extension are one sample whose members lie apart. Otherwise the key comes more than once: each
    run is a sample if each has a picture, else the first of each extension go together, the second, and so on.
    """
    kinds = [e for _, members in runs for e in members]
    if len(set(kinds)) == len(kinds):
        yield runs[0][0], {e: where for _, members in runs for e, where in members.items()}
        return
    if all(has_picture(members) for _, members in runs):
        yield from runs
        return
    samples: list[tuple[int, dict[str, tuple[int, int]]]] = []
    for first, members in runs:
        for extension, where in members.items():
            free = next((m for _, m in samples if extension not in m), None)
            if free is None:
                samples.append((first, free := {}))
            free[extension] = where
    yield from samples


def has_picture(members: Iterable[str]) -> bool:
    """Whether one of these extensions is a picture's or a cached one's."""
    return any(e in IMAGES or e == CACHED for e in members)


def _without_the_cut(rows: Rows, name: str | None) -> tuple[Rows, int]:
    """Without the samples that the end of the file took members from, as far as it can be told, and how many they were.

    They are the one of the member that is cut, a last one that lacks what the one before it has, and, where the members
    of a sample lie apart, those that lack what the first has.
    """
    before = len(rows)
    if name:
        key = split_name(name)[0]
        last = next((i for i in range(before - 1, -1, -1) if rows[i][0] == key), before)
        rows = rows[:last] + rows[last + 1 :]
    if len(rows) > 1 and max(o for o, _ in rows[0][1].values()) > min(o for o, _ in rows[1][1].values()):
        rows = [row for row in rows if not set(row[1]) < set(rows[0][1])]
    elif not name and len(rows) > 1 and set(rows[-1][1]) < set(rows[-2][1]):
        rows = rows[:-1]
    return rows, before - len(rows)
