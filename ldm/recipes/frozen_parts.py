"""The parts of a training that do not train, in what `train.engine.frozen` says."""

from __future__ import annotations

from collections.abc import Sequence

from ldm import dist
from ldm.models.frozen import Storage, of_autoencoder, store
from ldm.models.streaming import stop
from ldm.models.text import TextEncoder, TextPrecision
from ldm.models.vae.autoencoder import Autoencoder
from ldm.pipeline import TextToImage


def open_on(source: str, storage: Storage, precision: TextPrecision, blocks: int | None = None) -> TextToImage:
    """A base model whose network waits on the CPU until `store_network`, unless it stays as it is.

    With `blocks` so many of the network's are on this process's device at once.
    """
    device, stays = dist.device(), storage == "fp32" and blocks is None
    pipeline = TextToImage.load(source, device=device if stays else "cpu", text_precision=precision)
    if blocks is not None:
        return pipeline.stream(blocks, device, offload=False)
    for part in (pipeline.codec.autoencoder, *pipeline.text):
        part.to(device)
    return pipeline


def store_network(pipeline: TextToImage, storage: Storage, *, trains: bool, blocks: int | None = None) -> TextToImage:
    """The pipeline with its network on this process's device, stored so unless it trains.

    With `blocks` it is stored on the CPU, and so many of its blocks are on the device at once.
    """
    if blocks is not None and storage != "fp32":
        stop(pipeline.network)
        store(pipeline.network, storage)
        return pipeline.with_network(pipeline.network).stream(blocks, dist.device(), offload=False)
    if blocks is not None:
        return pipeline
    if storage == "fp32" or trains:
        pipeline.network.to(dist.device())
        return pipeline
    store(pipeline.network, storage, dist.device())
    return pipeline.with_network(pipeline.network)  # without copies of what merged adapters changed


def store_beside(
    storage: Storage, autoencoder: Autoencoder | None, text: Sequence[TextEncoder], precision: TextPrecision
) -> None:
    """Store an autoencoder, and text encoders that have no precision of their own."""
    if autoencoder is not None:
        store(autoencoder, of_autoencoder(storage))
    for encoder in text if precision == "fp32" else ():
        store(encoder, storage)
