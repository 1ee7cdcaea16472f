"""Text to image: what users import."""

from __future__ import annotations

from ldm.pipeline.control import Control
from ldm.pipeline.image_prompt import ImagePrompt
from ldm.pipeline.text_to_image import Guide, Progress, TextToImage, Wrap
from ldm.sampling import SAMPLERS
from ldm.sampling.settings import Settings

__all__ = ["SAMPLERS", "Control", "Guide", "ImagePrompt", "Progress", "Settings", "TextToImage", "Wrap"]
