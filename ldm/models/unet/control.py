"""Hands on the U-Net's attention: see `ldm.models.control`, where they are for every network."""

from ldm.models.control import Hand, attention_layers, controlled

__all__ = ["Hand", "attention_layers", "controlled"]
