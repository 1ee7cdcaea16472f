"""Caches against what the callables gave: any number of processes, killed and resumed, refused when made otherwise."""

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from safetensors.torch import load
from torch import Tensor

from ldm.data.cache import MEMBER
from ldm.data.encode import EncodeConfig, build_cache, encode, finish, missing
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from ldm.data.mixture import MixtureConfig, Source, open_data
from ldm.data.shards import Shards
from ldm.models.text import TextConfig, TextTower
from ldm.objectives.inputs import LatentFeed
from ldm.recipes.sources import text_encoder, weights_hash
from ldm.rng import Rng
from tests.unit.data.standins import HASHES, moments, states

Make = Callable[..., Path]


def take(loader: Loader, count: int, start: int = 0) -> list[dict[str, object]]:
    return list(itertools.islice(loader.batches(start), count))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_cached_batches_are_what_online_gives(make_set: Make, tmp_path: Path, dtype: str) -> None:
    folder = make_set(23)
    config = EncodeConfig(path=str(folder), size=8, dtype=dtype, batch=5, part=9)  # type: ignore[arg-type]
    manifest = build_cache(config, tmp_path / "cache", moments=moments, text=states, hashes=HASHES)
    assert manifest.samples("train") == 23
    error = manifest.notes["relative_rms_error"]
    bound = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}[dtype]
    assert set(error) == {"moments", "text", "pooled"}
    assert max(error.values()) <= bound
    cached = Loader(DataConfig(path=str(tmp_path / "cache"), cached=True), seed=4, micro_batch=6)
    by_key: dict[str, Tensor] = {}
    for batch in take(Loader(DataConfig(path=str(folder), size=8), seed=4, micro_batch=1), 23):
        by_key[batch["key"][0]] = batch["image"]  # type: ignore[index,assignment]
    tolerance = {"rtol": max(bound * 2, 1e-6), "atol": 1e-6}
    for batch in take(cached, 8):
        expected = torch.cat([moments(by_key[k]) for k in batch["key"]])  # type: ignore[attr-defined]
        torch.testing.assert_close(batch["moments"], expected, **tolerance)
        texts = states(batch["caption"])  # type: ignore[arg-type]
        torch.testing.assert_close(batch["text"], texts["text"], **tolerance)
        torch.testing.assert_close(batch["pooled"], texts["pooled"], **tolerance)
        assert "image" not in batch
    assert len({c for b in take(cached, 40) for c in b["caption"]}) > 23  # both captions of some # type: ignore


def test_many_processes_killed_and_resumed_give_one_cache(make_set: Make, tmp_path: Path) -> None:
    config = EncodeConfig(path=str(make_set(40, shard_samples=11)), size=8, batch=4, part=7)
    one = build_cache(config, tmp_path / "one", moments=moments, text=states, hashes=HASHES)

    calls = itertools.count()

    def dies(images: Tensor) -> Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return moments(images)

    out = tmp_path / "three"
    with pytest.raises(KeyboardInterrupt):
        encode(config, out, moments=dies, text=states, hashes=HASHES, rank=0, world=3)
    assert not list(out.glob(".*.part"))
    with pytest.raises(ValueError, match="is missing; run the same encoding again"):
        finish(config, out)
    for rank in (1, 0):  # resumed with another world size
        encode(config, out, moments=moments, text=states, hashes=HASHES, rank=rank, world=2)
    assert finish(config, out).shards == one.shards
    keys = [s["__key__"] for s in wds.WebDataset([str(out / s.file) for s in one.shards], shardshuffle=False)]
    assert sorted(keys) == [f"s{i:05d}" for i in range(40)]
    again = build_cache(config, out, moments=dies, text=states, hashes=HASHES)
    assert again.shards == one.shards  # nothing was encoded again, or the callable would have been asked
    assert next(calls) == 4


_WORKER = """
import sys, time
from pathlib import Path
import torch
from ldm.data.encode import EncodeConfig, encode
from tests.unit.data.test_encode import HASHES, moments, states

torch.set_num_threads(1)
source, out, rank, world = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def slow(images):
    print(flush=True)
    time.sleep(0.05)
    return moments(images)

config = EncodeConfig(path=source, size=8, batch=4, part=7)
encode(config, out, moments=slow, text=states, hashes=HASHES, rank=rank, world=world)
"""


def test_processes_that_are_killed_lose_and_repeat_nothing(make_set: Make, tmp_path: Path) -> None:
    """SIGKILL, which no handler tidies up after, to two real processes in the middle of a part each."""
    folder = make_set(40, shard_samples=11, bad=(2, 30))
    config = EncodeConfig(path=str(folder), size=8, batch=4, part=7)
    one = build_cache(config, tmp_path / "one", moments=moments, text=states, hashes=HASHES)
    out = tmp_path / "two"
    command = [sys.executable, "-c", _WORKER, str(folder), str(out)]
    root = Path(__file__).parents[3]
    processes = [subprocess.Popen([*command, str(r), "2"], stdout=subprocess.PIPE, cwd=root) for r in range(2)]
    for process in processes:
        assert process.stdout is not None
        with process.stdout as said:
            for _ in range(4):  # two batches a part
                said.readline()
            process.kill()
        assert process.wait() == -signal.SIGKILL
    assert list(out.glob(".*.part"))
    assert 0 < missing(config, out) < 6
    encode(config, out, moments=moments, text=states, hashes=HASHES)
    two = finish(config, out)
    assert two.shards == one.shards  # with the tars' hashes
    assert two.notes == one.notes
    assert (out / "quarantine.jsonl").read_text() == (tmp_path / "one" / "quarantine.jsonl").read_text()
    assert (out / "quarantine.jsonl").read_text().count("\n") == 2
    assert not list(out.glob(".*.part"))
    assert two.notes["bytes_per_sample"] == round(sum(p.stat().st_size for p in out.glob("*.tar")) / 38)


def test_other_weights_sizes_and_crops_are_refused(make_set: Make, tmp_path: Path) -> None:
    folder = make_set(9)
    out = tmp_path / "cache"
    config = EncodeConfig(path=str(folder), size=8)
    build_cache(config, out, moments=moments, text=states, hashes=HASHES)
    data = DataConfig(path=str(out), cached=True)
    Loader(data, seed=0, micro_batch=3, expect={"vae": "aa", "size": 8, "crop": "center"})
    refused: list[tuple[dict[str, object], str]] = [
        ({"vae": "zz"}, "vae='aa', this run has 'zz'"),
        ({"text": "zz"}, "text='bb', this run has 'zz'"),
        ({"size": 16}, "size=8, this run has 16"),
        ({"crop": "random"}, "crop='center', this run has 'random'"),
    ]
    for expect, why in refused:
        with pytest.raises(ValueError, match=f"cache was made with {why}"):
            Loader(data, seed=0, micro_batch=3, expect=expect)
    for name, value in {"size": 16, "crop": "random", "fit": "pad", "flip": True, "template": "a {}"}.items():
        with pytest.raises(ValueError, match=f"made with {name}=.*, this run has "):
            Loader(replace(data, **{name: value}), seed=0, micro_batch=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="was begun with text='bb', not 'cc'"):
        encode(config, out, moments=moments, text=states, hashes={"vae": "aa", "text": "cc"})
    other = EncodeConfig(path=str(make_set(10, name="other")), size=8)
    with pytest.raises(ValueError, match="was begun with another source"):
        encode(other, out, moments=moments, text=states, hashes=HASHES)
    with pytest.raises(ValueError, match="not finite as"):
        build_cache(config, tmp_path / "c2", moments=lambda x: moments(x) * 1e6, text=None, hashes=HASHES)


def test_bad_samples_are_left_out_and_listed(make_set: Make, tmp_path: Path) -> None:
    config = EncodeConfig(path=str(make_set(20, bad=(3, 11))), size=8, part=6)
    manifest = build_cache(config, tmp_path / "c", moments=moments, text=states, hashes=HASHES)
    assert manifest.samples("train") == 18
    assert manifest.notes["bad"] == 2
    listed = [json.loads(line) for line in (tmp_path / "c" / "quarantine.jsonl").read_text().splitlines()]
    assert [(e["key"], e["reason"]) for e in listed] == [("s00003", "unknown_format"), ("s00011", "unknown_format")]


def test_variants_are_stored_and_drawn(make_set: Make, tmp_path: Path) -> None:
    config = EncodeConfig(path=str(make_set(12)), size=8, crop="random", flip=True, variants=3)
    manifest = build_cache(config, tmp_path / "c", moments=moments, text=None, hashes={"vae": "aa"})
    sample = next(iter(wds.WebDataset(str(tmp_path / "c" / manifest.shards[0].file), shardshuffle=False)))
    stored = load(sample["cache.safetensors"])
    assert stored["moments"].shape == (3, 8, 4, 4)
    loader = Loader(DataConfig(path=str(tmp_path / "c"), cached=True), seed=0, micro_batch=12)
    batch = take(loader, 1)[0]
    assert batch["moments"].shape == (12, 8, 4, 4)  # type: ignore[attr-defined]
    assert np.isfinite(batch["moments"]).all()  # type: ignore[call-overload]
    assert "text" not in batch


def test_features_are_those_of_their_own_variant(make_set: Make, tmp_path: Path) -> None:
    """Crops and flips have features of their own, float16 whatever the rest is; each comes with its own latents."""
    config = EncodeConfig(path=str(make_set(12)), size=8, crop="random", flip=True, variants=3, dtype="float32")
    hashes = {"vae": "aa", "features": "net:1"}
    shown: list[Tensor] = []

    def told_apart(images: Tensor) -> Tensor:
        shown.append(images)  # the pictures are of one colour each: the variant's number is added
        return moments(images) + len(shown)

    def features(images: Tensor) -> Tensor:
        assert torch.equal(images, shown[-1])
        return moments(images)[:, 2:5] + len(shown)

    encode(config, tmp_path / "c", moments=told_apart, text=None, hashes=hashes, features=features)
    manifest = finish(config, tmp_path / "c")
    assert sum(map(len, shown)) == 3 * 12
    sample = next(iter(wds.WebDataset(str(tmp_path / "c" / manifest.shards[0].file), shardshuffle=False)))
    stored = load(sample["cache.safetensors"])
    assert (stored["features"].shape, stored["features"].dtype) == ((3, 3, 4, 4), torch.float16)
    assert not torch.equal(stored["features"][0], stored["features"][1])
    data = DataConfig(path=str(tmp_path / "c"), cached=True)
    for batch in take(Loader(data, seed=0, micro_batch=12, expect=hashes), 4):
        made: Tensor = batch["features"]  # type: ignore[assignment]
        assert torch.equal(made, batch["moments"][:, 2:5].half().float())  # type: ignore[index]
    with pytest.raises(ValueError, match=r"cache was made with features='net:1', this run has 'net:2'"):
        Loader(data, seed=0, micro_batch=12, expect={"features": "net:2"})
    with pytest.raises(ValueError, match=r"was begun with features='net:1', not 'net:2'"):
        encode(config, tmp_path / "c", moments=moments, text=None, hashes={"vae": "aa", "features": "net:2"})


def masked(texts: list[str]) -> dict[str, Tensor]:
    """As an encoder with a mask: 2 to 9 tokens, then padding whose states are not zero."""
    lengths = torch.tensor([sum(map(ord, t)) % 8 + 2 for t in texts])
    mask = torch.arange(12) < lengths[:, None]
    codes = torch.tensor([[float(sum(map(ord, t)) % 97)] for t in texts])
    text = (codes[:, :, None] + torch.arange(12.0)[:, None]).expand(-1, -1, 3) + torch.arange(3.0)
    return {"text.1": text.clone(), "mask.1": mask.float(), "pooled.0": codes}


def test_masked_texts_are_stored_without_padding(make_set: Make, tmp_path: Path) -> None:
    """A batch is as long as its longest text; a text costs what it is long."""
    config = EncodeConfig(path=str(make_set(23)), size=8, dtype="float32", batch=5, part=9)
    build_cache(config, tmp_path / "c", moments=None, text=masked, hashes=HASHES)
    source = DataConfig(path=str(tmp_path / "c"), cached=True)
    lengths = set()
    for batch in take(Loader(source, seed=4, micro_batch=3), 20):
        whole = masked(batch["caption"])  # type: ignore[arg-type]
        longest = int(whole["mask.1"].sum(1).max())
        lengths.add(longest)
        mask = whole["mask.1"][:, :longest]
        text: Tensor = batch["text.1"]  # type: ignore[assignment]
        assert text.shape[1] >= longest  # as long as the longest caption of its samples
        assert torch.equal(batch["mask.1"][:, :longest], mask)  # type: ignore[index]
        assert not batch["mask.1"][:, longest:].any()  # type: ignore[index]
        seen = mask.bool()
        assert torch.equal(text[:, :longest][seen], whole["text.1"][:, :longest][seen])
        assert torch.equal(batch["pooled.0"], whole["pooled.0"])  # type: ignore[arg-type]
    assert len(lengths) > 1
    shards = Shards(Manifest.read(tmp_path / "c"), "train")
    stored = [load(shards.read(i)[1][MEMBER])["text.1"].shape[1] for i in range(len(shards))]
    assert max(stored) < 12
    assert len(set(stored)) > 1
    two = MixtureConfig(sources=(Source(data=source, name="a"), Source(data=source, name="b")))
    batch = next(open_data(two, seed=1, micro_batch=8).batches(0))
    assert torch.equal(batch["mask.1"].sum(1), masked(batch["caption"])["mask.1"].sum(1))


def zeroed(texts: list[str]) -> dict[str, Tensor]:
    """As T5 with padding zero gives them: no mask, and zeros where a mask would be; and a text that is zeros alone."""
    cond = masked(texts)
    return {"text.1": cond["text.1"] * cond["mask.1"][..., None], "text.2": torch.zeros(len(texts), 12, 5)}


def test_zeros_at_the_end_are_not_stored(make_set: Make, tmp_path: Path) -> None:
    """What a loss is fed of them is what the encoder gives, at its full length."""
    config = EncodeConfig(path=str(make_set(23)), size=8, dtype="float32", batch=5, part=9)
    manifest = build_cache(config, tmp_path / "c", moments=None, text=zeroed, hashes=HASHES)
    full = build_cache(
        config, tmp_path / "full", moments=None, text=lambda t: {k: v + 1 for k, v in zeroed(t).items()}, hashes=HASHES
    )
    shards = Shards(Manifest.read(tmp_path / "c"), "train")
    stored = [load(shards.read(i)[1][MEMBER]) for i in range(len(shards))]
    assert len({s["text.1"].shape[1] for s in stored}) > 1
    assert {s["text.2"].shape[1] for s in stored} == {1}
    told = sum(v.nbytes for s in stored for v in s.values()) / sum(len(s["text.1"]) for s in stored)
    assert manifest.notes["text_bytes_per_caption"] == round(told) < full.notes["text_bytes_per_caption"] / 2
    feed = LatentFeed(None, lambda t: zeroed(list(t)), 0.0)  # type: ignore[arg-type]
    source = DataConfig(path=str(tmp_path / "c"), cached=True)
    two = MixtureConfig(sources=(Source(data=source, name="a"), Source(data=source, name="b")))
    for data in (source, two):
        for step in range(4):
            batch = next(open_data(data, seed=step, micro_batch=3).batches(0))
            cond = feed.cond(batch, Rng(0, (0, 1, 2)), torch.device("cpu"))
            wanted = zeroed(batch["caption"])  # type: ignore[arg-type]
            assert all(torch.equal(cond[k], v) for k, v in wanted.items())


def test_the_states_of_all_towers_are_stored(make_set: Make, tmp_path: Path) -> None:
    """As SDXL has them: both towers' states side by side and the second's pooled state, of every caption."""
    text = {"width": 16, "heads": 2, "layers": 2, "context_length": 10, "vocab_size": 4096, "bpe": "emoji"}
    torch.manual_seed(0)
    first = TextTower(TextConfig(**text))  # type: ignore[arg-type]
    second = TextTower(TextConfig(**text, pad="zero", projection=6, output="penultimate"))  # type: ignore[arg-type]
    config = EncodeConfig(path=str(make_set(12)), size=8, dtype="float32", batch=5)
    states_of = text_encoder([first, second])
    hashes = {"text": weights_hash(first, second)}
    build_cache(config, tmp_path / "c", moments=None, text=lambda t: dict(states_of(t)), hashes=hashes)
    loader = Loader(DataConfig(path=str(tmp_path / "c"), cached=True), seed=0, micro_batch=12, expect=hashes)
    seen = set()
    for batch in take(loader, 8):
        for row, caption in enumerate(batch["caption"]):  # type: ignore[arg-type,var-annotated]
            seen.add(caption)
            with torch.no_grad():
                one, two = (tower.encode(tower.tokenize([caption])) for tower in (first, second))
            both = torch.cat([one["text"], two["text"]], -1)[0]
            torch.testing.assert_close(batch["text"][row], both, rtol=0, atol=1e-5)  # type: ignore[index]
            torch.testing.assert_close(batch["pooled"][row], two["pooled"][0], rtol=0, atol=1e-5)  # type: ignore[index]
    assert len(seen) > 16
    with pytest.raises(ValueError, match="cache was made with text="):
        Loader(DataConfig(path=str(tmp_path / "c"), cached=True), seed=0, micro_batch=1, expect={"text": "other"})
