"""Which samples a split holds, as one hash: what was computed from them is kept under it."""

from __future__ import annotations

import hashlib
import json

from ldm.data.decode import BadSample
from ldm.data.manifest import Manifest
from ldm.data.remote import RemoteConfig
from ldm.data.shards import Shards


def fingerprint(manifest: Manifest, split: str, remote: RemoteConfig | None = None) -> str:
    """A hash of a split's samples in their order: the tars' content, what a filter kept of them, buckets and repeats.

    Names of files and folders are not in it. Where a manifest of an older version does not say what was kept of a tar,
    its index is read.
    """
    shards = Shards(manifest, split, remote)
    told = [[s.sha256, rows(shards, i), s.bucket, s.repeats] for i, s in enumerate(shards.shards)]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def rows(shards: Shards, number: int) -> str:
    """The digest of a shard's index, "lost" of one that cannot be read."""
    shard = shards.shards[number]
    if shard.rows is not None:
        return shard.rows
    try:
        return shards.index(number).digest()
    except BadSample:
        return "lost"
