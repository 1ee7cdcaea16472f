"""Names of the models that the package ships."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SHIPPED = {"emoji": ASSETS / "emoji_64", "emoji_lcm": ASSETS / "emoji_lcm", "clip_emoji": ASSETS / "clip_emoji"}


def locate(source: str) -> Path:
    """The folder of a shipped model's name or of a path. Raises ValueError when there is none."""
    folder = SHIPPED.get(source, Path(source))
    if not folder.is_dir():
        raise ValueError(f"model {source!r}: not a shipped model ({', '.join(SHIPPED)}) and no such folder")
    return folder
