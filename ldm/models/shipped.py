"""Names of the models that the package ships."""

from __future__ import annotations

from pathlib import Path

from ldm.words import expanded, near

ASSETS = Path(__file__).resolve().parents[1] / "assets"
SHIPPED = {
    "emoji": ASSETS / "emoji_64",
    "emoji_lcm": ASSETS / "emoji_lcm",
    "clip_emoji": ASSETS / "clip_emoji",
    "emoji_128": ASSETS / "emoji_128",
    "emoji_128_lcm": ASSETS / "emoji_128_lcm",
    "ip_adapter_emoji": ASSETS / "ip_adapter_emoji",
}
DEFAULT = "emoji_128"
"""Draws where no model is asked for."""
PARTS = {
    "clip_emoji": "a CLIP, which judges",
    "ip_adapter_emoji": "an IP-Adapter of 'emoji', for --ip-adapter",
}
"""Those that do not draw."""
IP_ADAPTERS = frozenset({"ip_adapter_emoji"})
STUDENTS = {"emoji": "emoji_lcm", "emoji_128": "emoji_128_lcm"}
"""Few-step students, LoRAs that draw by themselves, by their teacher."""
_TEXT = {SHIPPED["emoji_128"]: SHIPPED["emoji"]}
"""Models that were trained with another's text encoder: it is stored once."""


def check_draws(source: str | Path, key: str = "model") -> None:
    """Raise ValueError naming `key` for a shipped model that does not draw."""
    if str(source) in PARTS:
        others = ", ".join(name for name in SHIPPED if name not in PARTS)
        raise ValueError(f"{key} {str(source)!r} is {PARTS[str(source)]}; shipped models that draw: {others}")


def text_home(folder: Path) -> Path:
    """The folder that holds the text encoders of a model's folder: itself, unless a shipped one has another's."""
    return _TEXT.get(folder.resolve(), folder)


def named(source: str | Path) -> Path:
    """The folder of a shipped model's name; anything else as a path, whether it is there or not."""
    return SHIPPED.get(str(source)) or Path(expanded(str(source)))


def locate(source: str) -> Path:
    """The folder of a shipped model's name or of a path. Raises ValueError when there is none."""
    folder = named(source)
    if not folder.is_dir():
        hint = near(source, SHIPPED)
        raise ValueError(f"model {source!r}: not a shipped model ({', '.join(SHIPPED)}) and no such folder{hint}")
    return folder
