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
from ldm.data.manifest import Manifest, resolve
from ldm.evaluate.features import FeatureNetwork, extract, in_batches
from ldm.recipes import divided
from ldm.recipes.measure import real_pictures


def real_features(
    network: FeatureNetwork, data: str, split: str, ids: Sequence[int], size: int, cache: Path | None
) -> Tensor:
    """Features (N, D) float64 of a split's pictures, on rank 0; collective.

    With `cache`, a folder, they are read from there or left there; the file's name holds the network with its resize,
    the shards' hashes, the samples and their size. Otherwise the ranks divide the work.
    """
    shards = [shard.sha256 for shard in Manifest.read(resolve(data)).shards if shard.split == split]
    told = {"network": network.name, "shards": shards, "split": split, "ids": list(ids), "size": size}
    key = hashlib.blake2b(json.dumps(told).encode(), digest_size=12).hexdigest()
    path = None if cache is None else cache / f"features-{key}.safetensors"
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
