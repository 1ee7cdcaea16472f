"""What a file that should hold weights or settings is instead, when a download went wrong."""

from __future__ import annotations

from pathlib import Path


def instead(path: Path) -> str | None:
    """What a file is instead, as far as its first bytes tell: empty, a git-LFS pointer, a web page; None otherwise."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        return f"it is empty ({size} bytes); download or copy it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-LFS pointer; `git lfs pull` fetches the file itself"
    if start[:1] == b"<":
        return "it is a web page (HTML), as a download without a login gives; download it again"
    return None
