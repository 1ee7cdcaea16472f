"""The parts of a training that do not train, in what `train.engine.frozen` says."""

from __future__ import annotations

from collections.abc import Sequence

from ldm import dist
from ldm.models.frozen import Storage, check_storage, store
from ldm.models.network import Network
from ldm.models.text import TextEncoder, TextPrecision
from ldm.models.vae.autoencoder import Autoencoder
from ldm.pipeline import TextToImage


def check_frozen(storage: Storage, kind: str, frozen: bool) -> None:
    """Raise ValueError where a kind of task has no frozen parts, and for a package that is missing."""
    if storage != "fp32" and not frozen:
        raise ValueError(f"train.engine.frozen: {storage!r}, but everything trains in the task {kind}; write fp32")
    check_storage(storage)


def open_on(source: str, storage: Storage, precision: TextPrecision) -> TextToImage:
    """A base model whose network waits on the CPU until `store_network`, unless it stays as it is."""
    device = dist.device()
    pipeline = TextToImage.load(source, device=device if storage == "fp32" else "cpu", text_precision=precision)
    for part in (pipeline.codec.autoencoder, *pipeline.text):
        part.to(device)
    return pipeline


def store_network(pipeline: TextToImage, storage: Storage, *, trains: bool) -> TextToImage:
    """The pipeline with its network on this process's device, stored so unless it trains."""
    if storage == "fp32" or trains:
        pipeline.network.to(dist.device())
        return pipeline
    store(pipeline.network, storage, dist.device())
    return pipeline.with_network(pipeline.network)  # without copies of what merged adapters changed


def store_beside(
    storage: Storage, autoencoder: Autoencoder | None, text: Sequence[TextEncoder], precision: TextPrecision
) -> None:
    """Store an autoencoder, in bfloat16 at the least, and text encoders that have no precision of their own."""
    if storage == "fp32":
        return
    if autoencoder is not None:
        store(autoencoder, "bf16")
    for encoder in text if precision == "fp32" else ():
        store(encoder, storage)
