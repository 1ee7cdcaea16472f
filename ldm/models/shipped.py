"""Names of the models that the package ships."""

from __future__ import annotations

from pathlib import Path

from ldm.words import expanded, near

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SHIPPED = {"emoji": ASSETS / "emoji_64", "emoji_lcm": ASSETS / "emoji_lcm", "clip_emoji": ASSETS / "clip_emoji"}


def locate(source: str) -> Path:
    """The folder of a shipped model's name or of a path. Raises ValueError when there is none."""
    folder = SHIPPED.get(source) or Path(expanded(source))
    if not folder.is_dir():
        hint = near(source, SHIPPED)
        raise ValueError(f"model {source!r}: not a shipped model ({', '.join(SHIPPED)}) and no such folder{hint}")
    return folder
