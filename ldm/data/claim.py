"""What a cache was begun with, and whether it is what is asked for now: else it is refused before anything starts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ldm.config.load import encode as plain
from ldm.data.cache import LATER, trimmed
from ldm.data.captions import captions_of, filled
from ldm.data.decode import BadSample
from ldm.data.fingerprint import fingerprint
from ldm.data.manifest import Manifest, Shard, resolve, shard_of
from ldm.data.parts import EncodeConfig, Part, marker, parts_of
from ldm.data.scan import CACHED
from ldm.data.shards import Shards, say

SETTINGS = "cache.json"
_SAMPLES = 8
_CLOSE = 0.05

TextStates = Callable[[list[str]], dict[str, Tensor]]
"""Texts -> "text" (B, T, D), optionally "pooled" (B, P) and "mask" (B, T); of several encoders with their numbers."""


def settings(config: EncodeConfig, moments: bool, text: bool, hashes: Mapping[str, str]) -> dict[str, Any]:
    """All that decides what a cache holds: its samples, and what is made of them."""
    cached = {
        "size": None if config.buckets else config.size,
        "fit": config.fit,
        "crop": config.crop,
        "flip": config.flip,
        "variants": config.variants,
        "template": config.template,
        "dtype": config.dtype,
        "moments": moments,
        "text_states": text,
        **dict(sorted(hashes.items())),
        **({"buckets": True} if config.buckets else {}),
        **({"pairs": plain(config.pairs)} if config.pairs else {}),
        **({"trigger": config.trigger} if config.trigger else {}),
        **({} if config.require_captions else {"require_captions": False}),
    }
    source = Manifest.read(resolve(config.path))
    content = {s: {"samples": source.samples(s), "hash": fingerprint(source, s)} for s in config.splits}
    return {"cached": cached, "seed": config.seed, "part": config.part, "source": content}


def claim(config: EncodeConfig, out: Path, wanted: dict[str, Any], text: TextStates | None) -> EncodeConfig:
    """Begin a cache, or go on with one that was begun alike; the config, with the parts as they were begun.

    Raises ValueError that names what differs. A cache of an older version is gone on with if its samples and states
    prove to be the same.
    """
    path = out / SETTINGS
    if not path.is_file():
        write(path, wanted)
        return config
    have = read(path)
    config = replace(config, part=have["part"])
    wanted = {**wanted, "part": have["part"]}
    _same_settings(out, have, wanted)
    if isinstance(have["source"], list):
        _prove_samples(config, out, have["source"])
    elif have["source"] != wanted["source"]:
        raise ValueError(_other_source(out, have["source"], wanted["source"]))
    if later := [k for k in LATER if k in wanted["cached"] and k not in have["cached"]]:
        _prove_states(config, out, text, later)
    if have != wanted:
        say(f"cache {str(out)!r}: made by an older version, and proven to be what is asked for")
        write(path, wanted)
    return config


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote. Raises ValueError if it is something else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cache: {str(path)!r} is damaged: {error}; encode into another folder") from error
    if not isinstance(tree, dict) or not {"cached", "seed", "part", "source"} <= tree.keys():
        raise ValueError(f"cache: {str(path)!r} tells no settings of a cache; encode into another folder")
    return tree


def write(path: Path, tree: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(tree, indent=1))
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def finished(out: Path, part: Part) -> dict[str, Any] | None:
    """What is told of a part that is whole, its tars being there; None of one that is to be encoded."""
    path = marker(out, part)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        shards = [shard_of(entry) for entry in tree["shards"]]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        say(f"cache {str(out)!r}: {path.name} is damaged; its part is encoded anew")
        return None
    for shard in shards:
        if not _there(out / shard.file, shard) or not (out / shard.index).is_file():
            say(f"cache {str(out)!r}: {shard.file} is missing or has another size; its part is encoded anew")
            return None
    return tree


def _there(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.bytes


def _same_settings(out: Path, have: dict[str, Any], wanted: dict[str, Any]) -> None:
    if have["seed"] != wanted["seed"]:
        raise ValueError(f"cache {str(out)!r} was begun with another seed; choose another folder")
    mine, theirs = have["cached"], wanted["cached"]
    for key in sorted({*mine, *theirs}):
        if mine.get(key) != theirs.get(key) and not (key in LATER and key not in mine):
            raise ValueError(
                f"cache {str(out)!r} was begun with {key}={mine.get(key)!r}, not {theirs.get(key)!r}: encode into "
                "another folder, or remove this one"
            )


def _other_source(out: Path, have: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    told = [
        f"split {s!r} had {have[s]['samples']} samples, now {wanted[s]['samples']}, not the same in the same order"
        for s in wanted
        if s in have and have[s] != wanted[s]
    ]
    told = told or [f"splits {', '.join(have)} then, {', '.join(wanted)} now"]
    return (
        f"cache {str(out)!r} was begun with another source: {'; '.join(told)} (tars, filter, buckets or repeats "
        "changed): encode into another folder, or remove this one"
    )


def _prove_samples(config: EncodeConfig, out: Path, tars: list[str]) -> None:
    """Raise ValueError unless what is there of an older version's cache holds just these samples, in this order."""
    source = Manifest.read(resolve(config.path))
    same = tars == sorted(s.sha256 for split in config.splits for s in source.split(split))
    for split in config.splits if same else ():
        keys = Shards(source, split)
        for part in parts_of(config, source, split):
            if (tree := finished(out, part)) is not None:
                same = same and _holds(out, tree, [keys.key(i) for i in range(part.start, part.stop)])
    if not same:
        raise ValueError(
            f"cache {str(out)!r} was begun with another source: an older version made it, which did not record the "
            "samples, and it does not hold those that the data set has now: encode into another folder, or remove this "
            "one"
        )


def _holds(out: Path, tree: Mapping[str, Any], keys: list[str]) -> bool:
    """Whether a part's tars have these keys in this order, but for its bad ones."""
    stored = [k for s in tree["shards"] for k in _index(out, s)]
    bad = tree["bad"]
    if isinstance(bad, int):  # the oldest version only counted them
        rest = iter(keys)
        return len(stored) + bad == len(keys) and all(k in rest for k in stored)
    left_out = {entry["key"] for entry in bad}
    return len(stored) + len(bad) == len(keys) and stored == [k for k in keys if k not in left_out]


def _index(out: Path, entry: dict[str, Any]) -> tuple[str, ...]:
    shard = shard_of(entry)
    return Shards(Manifest(name="", shards=(shard,), folder=out), shard.split).index(0).keys


def _prove_states(config: EncodeConfig, out: Path, text: TextStates | None, later: list[str]) -> None:
    """Raise ValueError unless the first stored captions, encoded again, give what is stored, up to its rounding."""
    source = Manifest.read(resolve(config.path))
    for split in config.splits:
        for part in parts_of(config, source, split):
            if text is None or (tree := finished(out, part)) is None:
                continue
            for entry in tree["shards"]:
                manifest = Manifest(name="", shards=(shard_of(entry),), folder=out)
                if not _alike(Shards(manifest, split), config.template, text):
                    raise ValueError(
                        f"cache {str(out)!r}: an older version made it, which did not record {', '.join(later)}, and "
                        "captions encoded now give other states (tokens or layers): encode into another folder, or "
                        "remove this one"
                    )
                return


def _alike(shards: Shards, template: str, text: TextStates) -> bool:
    lost, whole = 0.0, 0.0
    for i in range(min(len(shards), _SAMPLES)):
        try:
            members = shards.read(i)[1]
            known, meta = captions_of(members, required=False)
            texts = [filled(template, t, meta) for t in known.texts]
            stored = safetensors.torch.load(members[CACHED])
        except (BadSample, KeyError, safetensors.SafetensorError):
            continue
        made = text(texts)
        for name, value in (made | trimmed(made)).items():
            old, new = stored[name].double(), value.detach().double().cpu()
            if old.shape != new.shape:
                return False
            lost, whole = lost + float((old - new).square().sum()), whole + float(new.square().sum())
    return lost <= _CLOSE**2 * whole or not torch.isfinite(torch.tensor(whole))
