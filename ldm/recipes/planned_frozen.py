"""Networks that do not train in a plan: as the engine holds them, and what of them is on the device."""

from __future__ import annotations

from ldm.models.frozen import Storage, of_autoencoder, store, stored_bytes
from ldm.models.network import Network
from ldm.models.text import TextEncoder, TextPrecision, text_bytes
from ldm.models.vae.autoencoder import Autoencoder
from ldm.plan.streaming import Streamed
from ldm.train.engine_config import EngineConfig


def network(of: Network, engine: EngineConfig) -> Streamed:
    """A network on the meta device, held as the engine holds what is frozen: it becomes so in place."""
    store(of.requires_grad_(False), engine.frozen)
    return Streamed.of(of, engine.blocks_on_device)


def autoencoder(vae: Autoencoder, storage: Storage) -> float:
    """Bytes of an autoencoder."""
    return float(stored_bytes(vae.requires_grad_(False), of_autoencoder(storage)))


def text(encoder: TextEncoder, storage: Storage, precision: TextPrecision) -> float:
    """Bytes of a text encoder: those of its own precision, where one is said."""
    if precision != "fp32" or storage == "fp32":
        return text_bytes(encoder, precision)
    return float(stored_bytes(encoder.requires_grad_(False), storage))
