"""Networks that do not train in a plan: as the engine holds them, and what of them is on the device."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ldm.models.frozen import Storage, held_bytes, store, stored_bytes
from ldm.models.network import Network
from ldm.models.text import TextEncoder, TextPrecision, text_bytes
from ldm.models.vae.autoencoder import Autoencoder
from ldm.plan.report import Frozen
from ldm.plan.streaming import Streamed, aligned
from ldm.train.engine_config import EngineConfig


def network(of: Network, engine: EngineConfig, name: str | None = None) -> tuple[Frozen, Streamed | None]:
    """A network on the meta device, held as the engine holds what is frozen: it becomes so in place.

    What of it is on the device at the fullest moment, and its blocks where they come and go.
    """
    store(of.requires_grad_(False), engine.frozen)
    return placed(of, engine.blocks_on_device, name)


def placed(of: Network, places: int | None, name: str | None = None) -> tuple[Frozen, Streamed | None]:
    """The same of one whose weights are as they will be."""
    total, name = float(held_bytes(of)), name or of.component
    blocks = [list(_tensors(block)) for _, block in of.blocks()]
    if places is None or places >= len(blocks):
        return Frozen(name=name, bytes=total), None
    streamed = Streamed.of([aligned(own) for own in blocks], places)
    inside = sum(float(t.numel() * t.element_size()) for own in blocks for t in own)
    return Frozen(name=name, bytes=total - inside + streamed.held), streamed


def _tensors(block: nn.Module) -> Iterator[Tensor]:
    yield from (t for t in (*block.parameters(), *block.buffers()) if t.numel())


def autoencoder(vae: Autoencoder, storage: Storage) -> float:
    """Bytes of an autoencoder, which has bfloat16 at the least (`frozen_parts.store_beside`)."""
    return float(stored_bytes(vae.requires_grad_(False), "fp32" if storage == "fp32" else "bf16"))


def text(encoder: TextEncoder, storage: Storage, precision: TextPrecision) -> float:
    """Bytes of a text encoder: those of its own precision, where one is said."""
    if precision != "fp32" or storage == "fp32":
        return text_bytes(encoder, precision)
    return float(stored_bytes(encoder.requires_grad_(False), storage))
