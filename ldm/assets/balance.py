"""Weigh objects against people: python ldm/assets/balance.py CACHE OUT (not imported by ldm).

Three in five of the embedded pictures are of people, in skin tones and genders; a model that sees all equally often
learns objects last. This writes a manifest over the same cached shards in which everything that is not of the group
`people-body` comes three times in an epoch: once with all, and twice through a filtered index. Tars are linked.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from ldm.cli.data import main as data
from ldm.data.manifest import Manifest


def balance(cache: Path, out: Path) -> Manifest:
    """The manifest of `out`, written."""
    everything = Manifest.read(cache / "manifest.json")
    objects = out / "objects"
    objects.mkdir(parents=True)
    for shard in everything.shards:
        os.link(cache / shard.file, out / shard.file)
        os.link(cache / shard.file, objects / f"objects-{shard.file}")
        shutil.copy(cache / str(shard.index), out / str(shard.index))
    data(["index", str(objects), "--where", "group != 'people-body'", "--split", "train"])
    views = []
    for shard in Manifest.read(objects / "manifest.json").shards:
        os.link(objects / shard.file, out / shard.file)
        shutil.copy(objects / str(shard.index), out / str(shard.index))
        views.append(replace(shard, split="train", repeats=2))
    shutil.rmtree(objects)
    shards = (*everything.shards, *views)
    result = replace(everything, name=f"{everything.name}-balanced", shards=shards, folder=out)
    result.write()
    return result


if __name__ == "__main__":
    made = balance(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.write(f"{made.name}: {sum(s.samples * s.repeats for s in made.shards)} samples an epoch\n")
