"""Whether a data set's pictures can be averaged for the first steps (`ldm.objectives.small`)."""

from __future__ import annotations

from ldm.data.loader import DataConfig
from ldm.data.manifest import Manifest, resolve
from ldm.data.mixture import Data
from ldm.models.network import Network
from ldm.models.transformers.base import Transformer
from ldm.objectives.small import SmallOptions, can_be_small, check_small


def check_pictures(options: SmallOptions | None, network: Network, factor: int, data: Data) -> None:
    """Raise ValueError for a network or sizes that cannot be small; `factor` is the autoencoder's.

    Buckets are those of data sets that are here; of others, at the first batch of one.
    """
    if options is None:
        return
    can_be_small(network)
    multiple = network.multiple if isinstance(network, Transformer) else 1
    for source in [data] if isinstance(data, DataConfig) else [s.data for s in data.sources]:
        for width, height in sorted(_shapes(source)):
            check_small(options, (height // factor, width // factor), multiple, f"{width} x {height} pictures' latents")


def _shapes(source: DataConfig) -> set[tuple[int, int]]:
    if not source.buckets:
        return {(source.size, source.size)}
    try:
        shards = Manifest.read(resolve(source.path), source.remote).split(source.split)
    except (ValueError, OSError):  # which who opens the data says
        return set()
    return {shard.bucket for shard in shards if shard.bucket is not None}
