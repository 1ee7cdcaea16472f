"""The families of transformers whose files are read and written: a module each, which is all that a new one needs."""

from __future__ import annotations

from ldm.checkpoint.families import flux, pixart, sd3, zimage
from ldm.checkpoint.families.base import Files

FILES: dict[str, Files] = {
    "sd3": sd3.FILES,
    "flux": flux.FILES,
    "pixart": pixart.FILES,
    "zimage": zimage.FILES,
}
"""By the `kind` of the network."""
