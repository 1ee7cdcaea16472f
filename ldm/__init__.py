"""Distributed latent-diffusion training with text conditioning: `ldm.load(...)` gives a text-to-image pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.pipeline import TextToImage

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(source: str, **options: Any) -> TextToImage:
    """Load a text-to-image pipeline from a diffusers folder, a run folder or checkpoint, or a shipped model's name.

    Raises ValueError when the source is not one of these.
    """
    from ldm.pipeline import TextToImage  # torch loads only when a pipeline is asked for
    from ldm.recipes.models import usable

    return TextToImage.load(usable(source), **options)
