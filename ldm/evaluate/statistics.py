"""Features of real pictures, computed once and kept: named by all that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import dist
from ldm.data.fingerprint import fingerprint
from ldm.data.manifest import Manifest, resolve
from ldm.evaluate import divided
from ldm.evaluate.measure import real_pictures
from ldm.metrics.features import EfficientNetLite0, FeatureNetwork, Inception, extract, in_batches
from ldm.recipes.sources import weights_hash


def real_features(
    network: FeatureNetwork, data: str, split: str, ids: Sequence[int], size: int, cache: Path | None
) -> Tensor:
    """Features (N, D) float64 of a split's pictures, on rank 0; collective.

    With `cache`, a folder, they are read from there or left there; the file's name holds the network with its weights
    and resize, which samples the split holds and which of them these are, and their size. Otherwise the ranks divide
    the work.
    """
    path = None if cache is None else cache / f"features-{_key(network, data, split, ids, size)}.safetensors"
    if path is not None and dist.from_first(int(path.is_file())):
        return load_file(path)["features"] if dist.rank() == 0 else torch.empty(0, 0)

    def describe(part: range) -> divided.Rows:
        pictures = real_pictures(data, split, [ids[i] for i in part], size)
        return {"features": extract(network, in_batches(pictures))}

    found = divided.described(len(ids), 64, describe)["features"]
    if path is not None and dist.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")  # jobs may do the same work; none reads half a file
        save_file({"features": found.contiguous()}, beside, metadata={"network": network.name, "split": split})
        os.replace(beside, path)
    return found


def samples_of(data: str, split: str) -> str:
    """A hash of which samples a split holds, in their order."""
    return fingerprint(Manifest.read(resolve(data)), split)


def _key(network: FeatureNetwork, data: str, split: str, ids: Sequence[int], size: int) -> str:
    weights = weights_hash(network.network) if isinstance(network, (EfficientNetLite0, Inception)) else None
    told = {
        "network": network.name,
        "weights": weights,
        "samples": samples_of(data, split),
        "ids": list(ids),
        "size": size,
    }
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=12).hexdigest()
