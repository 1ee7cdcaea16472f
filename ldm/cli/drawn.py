"""Pictures that are written with the settings that drew them, never over another, and those settings read back."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import __version__

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

KEY = "ldm"
"""The PNG text that holds the settings as JSON."""
GRID_PIXELS = 64_000_000
"""Pictures beyond this area are left out of a contact sheet."""
_NUMBERED = re.compile(r"(?:grid-)?(\d{4,})(?:-.*)?\.png")


class Album:
    """A folder of numbered pictures; a later call goes on behind the highest number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {str(folder)!r}: a file; expected a folder for the pictures")
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        self.first = max((int(m[1]) + 1 for name in names if (m := _NUMBERED.fullmatch(name))), default=0)

    @property
    def told(self) -> str | None:
        """What to say of a folder that holds pictures already."""
        return f"{self.folder} holds pictures already: numbers go on at {self.first:04d}" if self.first else None

    def add(self, picture: Image.Image, place: int, words: str, record: Mapping[str, Any]) -> Path:
        """Write a picture with its settings under its number and words."""
        name = f"-{slug(words) or 'empty'}" if words else ""
        return self._write(picture, f"{self.first + place:04d}{name}", record)

    def name(self, picture: Image.Image, name: str, record: Mapping[str, Any]) -> Path:
        """Write a picture with its settings under a name, or that name and a number if it is taken."""
        return self._write(picture, short(re.sub(r"[/\\\0]", "-", name), 100), record)

    def _write(self, picture: Image.Image, stem: str, record: Mapping[str, Any]) -> Path:
        from PIL.PngImagePlugin import PngInfo

        info, held = PngInfo(), io.BytesIO()
        info.add_text(KEY, json.dumps({"version": __version__, **record}))
        picture.save(held, "PNG", pnginfo=info)
        self.folder.mkdir(parents=True, exist_ok=True)
        again = 0
        while True:
            path = self.folder / (f"{stem}-{again}.png" if again else f"{stem}.png")
            try:
                _write_new(path, held.getvalue())
                return path
            except FileExistsError:
                again += 1


def slug(words: str) -> str:
    """Words as a part of a file's name: letters, marks and digits of any script, in small letters, others as one -."""
    plain = unicodedata.normalize("NFC", words.lower())
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else "-" for c in plain)
    return short(re.sub("-+", "-", kept).strip("-"), 60).strip("-")


def short(name: str, most: int) -> str:
    """At most so many characters, and twice as many bytes, of a name: file systems count bytes, 255 at most."""
    name = name[:most]
    while len(name.encode("utf-8", "surrogateescape")) > 2 * most:
        name = name[:-1]
    return name


def _write_new(path: Path, data: bytes) -> None:
    """A whole new file, or nothing; FileExistsError where there is one, also if it came in between."""
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        beside.write_bytes(data)
        try:
            os.link(beside, path)
        except FileExistsError:
            raise
        except OSError as error:  # a file system without links
            if path.exists():
                raise FileExistsError(path) from error
            os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def texts(path: Path) -> dict[str, str]:
    """The texts in a picture by key; what JPEG and WebP hold as a comment counts as "parameters".

    Raises ValueError for a file that is no picture.
    """
    from ldm.data.decode import notes

    found, comment = notes(path)
    if isinstance(comment, bytes):
        head, rest = comment[:8], comment[8:]
        comment = rest.decode("utf-16-be" if head == b"UNICODE\0" else "utf-8", errors="replace")
    if isinstance(comment, str) and comment.strip("\0 "):
        found.setdefault("parameters", comment.strip("\0 "))
    return found


def record(path: Path) -> dict[str, Any] | None:
    """The settings that `ldm` wrote into a picture; None if there are none. ValueError for a damaged text."""
    text = texts(path).get(KEY)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r}: its settings are damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r}: its settings are damaged: expected keys and values")
    return found


def fingerprint(modules: Sequence[nn.Module]) -> str:
    """A short hash of names, shapes and some of the values of all weights: quick, and other for another model."""
    total = hashlib.blake2b(digest_size=8)
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            rows = value.reshape(1, 1) if value.dim() == 0 else value
            for i in sorted({round(k * (len(rows) - 1) / 7) for k in range(8)}) if len(rows) else ():
                row = rows[i].reshape(-1)
                part = row[:: max(1, len(row) // 64)][:64].detach().cpu()
                total.update((part.double() if part.is_floating_point() else part).numpy().tobytes())
    return total.hexdigest()
