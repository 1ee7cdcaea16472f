"""Which of the data's pictures the demo's page shows: all but rude gestures."""

from __future__ import annotations

from collections.abc import Sequence

RUDE = ("middle finger",)
"""Words of captions whose pictures train, and are not shown."""


def shown(captions: Sequence[str], count: int) -> list[int]:
    """The places of the first `count` captions without rude words."""
    return [i for i, text in enumerate(captions) if not any(word in text.lower() for word in RUDE)][:count]
