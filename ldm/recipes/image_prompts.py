"""An IP-Adapter with the image encoder that it was trained with."""

from __future__ import annotations

from ldm.checkpoint import vision
from ldm.checkpoint.ip_adapter_files import about, load_ip_adapter, open_ip_adapter
from ldm.models.shipped import IP_ADAPTERS, named
from ldm.models.text.vision import ImageEncoder
from ldm.models.unet.image_prompt import IPAdapter
from ldm.pipeline.image_prompt import check_encoder
from ldm.recipes.models import usable
from ldm.recipes.sources import load_image_encoder


def load_pair(source: str, encoder: str | None = None, key: str = "--ip-adapter") -> tuple[IPAdapter, ImageEncoder]:
    """Both, of a published file, a run or its export; `encoder`: the name of another image encoder.

    Raises ValueError naming `key` for another thing, where no image encoder is known, and for one of another width.
    """
    path = named(source if source in IP_ADAPTERS else usable(source, key))
    config, _, file = open_ip_adapter(path)
    told = about(file)
    if encoder is None and told is not None:
        encoder = told.encoder
    if encoder is None:
        beside = vision.beside(file, config.sees_states, config.features)
        if beside is None:
            what = "states before the last layer" if config.sees_states else "embeddings"
            raise ValueError(f"{key} {source!r}: no image encoder beside it; give --image-encoder FOLDER, whose {what} "
                             f"have {config.features} features")  # fmt: skip
        encoder = str(beside)
    adapter, eyes = load_ip_adapter(path), load_image_encoder(encoder)
    check_encoder(adapter, eyes, f"{key} {source!r}")
    return adapter, eyes
