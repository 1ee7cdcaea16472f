"""Which tars a folder or an address holds."""

from __future__ import annotations

import contextlib
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path

from ldm.data.remote import Remote, RemoteDamage, is_remote

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")


@dataclass(frozen=True)
class Tar:
    """A tar at a path or address, its name for reports, and as the manifest calls it and its index."""

    place: str
    name: str
    file: str
    index: str


def find(source: Path | str, out: Path | None, remote: Remote) -> tuple[list[Tar], list[str]]:
    """The tars below a folder or an address, sorted, and what is odd beside them.

    An address may be of one tar, hold `{00000..00099}`, or be a folder that its server lists. Raises ValueError if
    there is none, or nowhere to put an address's manifest.
    """
    if is_remote(str(source)):
        return _far(str(source), out, remote)
    folder = Path(source)
    if folder.suffix.lower() == ".tar" and folder.is_file():
        raise ValueError(f"data {str(folder)!r}: a tar; give the folder that it is in")
    if not folder.is_dir():
        raise ValueError(f"data {str(folder)!r}: no such folder")
    files = sorted(p for p in folder.rglob("*") if not p.name.startswith("."))
    packed = [p for p in files if p.name.lower().endswith(_PACKED)]
    odd = [f"{os.path.relpath(p, folder)}: compressed; only plain tars can be indexed: unpack it" for p in packed]
    tars: list[Tar] = []
    taken: set[str] = set()
    for path in files:
        if path.suffix.lower() == ".tar":
            name = os.path.relpath(path, folder)
            index = _index(name) if _index(name) not in taken else f"{name}.index"  # a.tar beside a.TAR
            taken.add(index)
            file = name if out is None or out.resolve() == folder.resolve() else os.path.abspath(path)
            tars.append(Tar(str(path), name, file, index))
    if not tars:
        raise ValueError(f"data {str(folder)!r}: no .tar in it" + (f"; {'; '.join(odd[:3])}" if odd else ""))
    return tars, odd


def _far(address: str, out: Path | None, remote: Remote) -> tuple[list[Tar], list[str]]:
    if address.startswith("pipe:"):
        raise ValueError(f"data {address!r}: a command's output cannot be indexed; index its tars where they lie")
    if out is None:
        raise ValueError(
            f"data {address!r}: an address is read only: `--out FOLDER` puts manifest and indexes there, and the tars "
            "stay where they are (or index a copy here, and copy manifest.json and *.index beside the tars)"
        )
    if "{" in address:
        from webdataset.shardlists import expand_urls

        found = list(expand_urls(address))
    elif address.lower().endswith(".tar"):
        found = [address]
    else:
        found = []
        with contextlib.suppress(RemoteDamage):  # not there, or a server that lists nothing
            found = sorted(a for a in remote.find(address) if a.lower().endswith(".tar"))
    found = [a for a in found if not posixpath.basename(a).startswith(".")]
    if not found:
        how = f"{address.rstrip('/')}/{{00000..00099}}.tar"
        raise ValueError(f"data {address!r}: no .tar in it; of a server that lists no folders give the names: {how}")
    paths = [a.split("://", 1)[1] for a in found]
    base = posixpath.commonpath([posixpath.dirname(p) for p in paths])
    names = [posixpath.relpath(p, base or ".") for p in paths]
    return [Tar(a, n, a, _index(n)) for a, n in zip(found, names, strict=True)], []


def _index(name: str) -> str:
    return str(Path(name).with_suffix(".index"))
