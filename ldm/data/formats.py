"""What a file is by its name and first bytes: a picture that is read here, one that is not, or none of anybody's."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

IMAGES = (
    "webp", "jpg", "jpeg", "png", "bmp", "gif", "tif", "tiff", "ppm",
    "jpe", "jfif", "mpo", "apng", "dib", "pgm", "pbm", "pnm", "avif", "avifs", "jp2", "j2k", "jpx", "tga", "qoi",
)  # fmt: skip
"""Suffixes of pictures that are read; of a sample's members the first in this order is its picture."""

SUFFIXES = frozenset(f".{e}" for e in IMAGES)

READ = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA", "QOI")
"""Pillow's names of the formats that are opened; its other parsers, some of which start programs, see no bytes."""

_RAW = "3fr arw cr2 cr3 crw dcr dng erf iiq kdc mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f"  # fmt: skip
_VIDEO = "mp4 m4v mov avi mkv webm wmv mpg mpeg 3gp flv gifv"
UNREAD: dict[str, str] = {
    "heic": "HEIC",
    "heif": "HEIF",
    "hif": "HEIF",
    "jxl": "JPEG XL",
    "jxr": "JPEG XR",
    "wdp": "JPEG XR",
    "psd": "a Photoshop document",
    "psb": "a Photoshop document",
    "xcf": "a GIMP document",
    "kra": "a Krita document",
    "clip": "a Clip Studio document",
    "svg": "a vector drawing (SVG)",
    "svgz": "a vector drawing (SVG)",
    "ai": "a vector drawing (Illustrator)",
    "eps": "a vector drawing (EPS)",
    "exr": "OpenEXR",
    "hdr": "Radiance HDR",
    "dds": "a texture (DDS)",
    "ico": "an icon",
    "icns": "an icon",
    **dict.fromkeys(_RAW.split(), "a camera's raw picture"),
    **dict.fromkeys(_VIDEO.split(), "a video"),
}
"""Suffixes of what people keep among pictures and is not read, and what it is."""

_LEFT = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
_LEFT_FOLDERS = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", ".ipynb_checkpoints", ".git", ".thumbnails", ".Trashes"}
)
_HEIF = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"msf1"})
_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\x0a", UNREAD["jxl"]),
    (b"\0\0\0\x0cJXL \r\n\x87\n", UNREAD["jxl"]),
    (b"8BPS", UNREAD["psd"]),
    (b"gimp xcf", UNREAD["xcf"]),
    (b"v/1\x01", UNREAD["exr"]),
    (b"#?RADIANCE", UNREAD["hdr"]),
    (b"DDS ", UNREAD["dds"]),
    (b"\0\0\1\0", UNREAD["ico"]),
    (b"icns", UNREAD["icns"]),
    (b"II\xbc", UNREAD["jxr"]),
    (b"%!PS", UNREAD["eps"]),
    (b"%PDF", "a PDF document"),
    (b"FUJIFILMCCD-RAW", UNREAD["raf"]),
    (b"IIRO", UNREAD["orf"]),
    (b"IIRS", UNREAD["orf"]),
    (b"IIU\0", UNREAD["rw2"]),
    (b"\x1aE\xdf\xa3", UNREAD["webm"]),
)


_MAGIC = (
    (b"\xff\xd8\xff", "a JPEG", ".jpg"),
    (b"\x89PNG\r\n\x1a\n", "a PNG", ".png"),
    (b"GIF87a", "a GIF", ".gif"),
    (b"GIF89a", "a GIF", ".gif"),
)
_OTHERS = (
    "txt text caption json jsonl ndjson csv tsv parquet xml yaml yml toml md html htm pdf doc docx xls xlsx py log",
    "tar gz zip 7z rar index lock npy npz pt pth safetensors ckpt bin db sqlite lnk url aae xmp",
)
_NO_PICTURES = frozenset(" ".join(_OTHERS).split())


def misnamed(start: bytes) -> str | None:
    """What to do about a picture by its first bytes whose name has no picture's suffix; None if it is no picture."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "a WebP by its content; name it .webp"
    return next((f"{what} by its content; name it {end}" for m, what, end in _MAGIC if start.startswith(m)), None)


def may_be_misnamed(name: str) -> bool:
    """Whether a file's name leaves open that it is a picture."""
    return not (suffix(name) in _NO_PICTURES or f".{suffix(name)}" in SUFFIXES or suffix(name) in UNREAD)


def suffix(name: str) -> str:
    """A file name's last suffix without the dot, in lower case."""
    return os.path.splitext(name)[1][1:].lower()


def passed_over(name: str) -> bool:
    """Whether a path relative to its data set is no sample of anybody's: hidden, or left there by a system.

    Such are `.NAME` and what is in such a folder, macOS' `._NAME` and `__MACOSX/`, `Thumbs.db`, `desktop.ini`, a
    NAS's `@eaDir/`.
    """
    *folders, base = PurePosixPath(name).parts or ("",)
    hidden = any(part.startswith(".") and part != ".." for part in (*folders, base))
    return hidden or base.lower() in _LEFT or not _LEFT_FOLDERS.isdisjoint(folders)


def unread(name: str, data: bytes = b"") -> str | None:
    """What a picture is that is not read here, by its first bytes or else its suffix; None if nothing is known."""
    return _by_content(data) or UNREAD.get(suffix(name))


def _by_content(data: bytes) -> str | None:
    if data[4:8] == b"ftyp":
        brands = {data[i : i + 4] for i in range(8, min(len(data), 64), 4)}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if brands & _HEIF or data[8:12] == b"mif1":
            return "HEIC"
        return UNREAD["cr3"] if data[8:12] == b"crx " else UNREAD["mp4"]
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return UNREAD["avi"]
    if data[:4] == b"II*\0" and data[8:10] == b"CR":
        return UNREAD["cr2"]
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<svg") or (start.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in start):
        return UNREAD["svg"]
    return next((what for begin, what in _STARTS if data.startswith(begin)), None)
