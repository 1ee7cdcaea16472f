"""Arrays beside pictures against numpy's and safetensors' own writers; objects and forged headers are refused."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from numpy.lib import format as npy_format

from ldm.data.arrays import decode_arrays, npy
from ldm.data.decode import BadSample
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from ldm.data.write import ShardWriter
from tests.unit.data.pictures import png


def saved(array: Any, allow_pickle: bool = False, version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    npy_format.write_array(buffer, np.asanyarray(array), version=version, allow_pickle=allow_pickle)
    return buffer.getvalue()


def reason(data: bytes) -> str:
    with pytest.raises(BadSample) as info:
        npy(data)
    return info.value.reason


class Bomb:
    """Unpickling it would leave a trace."""

    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Bomb, "ran", True))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f8", "u1", "<i4", ">i8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_are_numpys(dtype: str, order: str) -> None:
    values = np.asarray(np.arange(24).reshape(2, 3, 4) % 2 if dtype == "?" else np.arange(24).reshape(2, 3, 4))
    values = values.astype(dtype, order=order)  # type: ignore[call-overload]
    for version in ((1, 0), (2, 0)):
        assert np.array_equal(npy(saved(values, version=version)), np.load(io.BytesIO(saved(values))))


def test_nothing_is_unpickled_or_allocated() -> None:
    assert reason(saved(np.array([Bomb()], dtype=object), allow_pickle=True)) == "object_array"
    assert reason(pickle.dumps(Bomb())) == "damaged"
    assert not Bomb.ran
    assert reason(saved(np.array(["text"]))) == "not_numeric"
    whole = saved(np.zeros((4, 4), np.float32))
    assert reason(whole[:-1]) == "damaged"
    assert reason(whole[:20]) == "damaged"
    assert reason(b"") == "damaged"
    forged = whole.replace(b"(4, 4), }", b"(1<<60,)}"[:9])
    assert reason(forged) == "damaged"
    huge = whole.replace(b"'shape': (4, 4), }       ", b"'shape': (10**3, 40000)} ")
    assert reason(huge) == "damaged"
    big = whole.replace(b"'shape': (4, 4), }          ", b"'shape': (400000, 400000)}  ")
    assert big != whole
    assert reason(big) == "damaged"


def test_members_become_tensors() -> None:
    states = {"text": np.arange(6, dtype=np.float16).reshape(3, 2), "mask": np.array([1, 0], np.int32)}
    members = {"depth.npy": saved(np.eye(3)), "npy": saved([7]), "t5.safetensors": safetensors.numpy.save(states)}
    found = decode_arrays(members, ["depth.npy", "npy", "t5.safetensors"])
    assert {k: (tuple(v.shape), v.dtype) for k, v in found.items()} == {
        "depth": ((3, 3), torch.float32),
        "npy": ((1,), torch.int64),
        "t5.text": ((3, 2), torch.float32),
        "t5.mask": ((2,), torch.int64),
    }
    assert torch.equal(found["t5.text"], torch.arange(6.0).view(3, 2))
    for bad, why in (({}, "no_array"), ({"a.safetensors": b"\xff" * 64}, "damaged")):
        with pytest.raises(BadSample) as info:
            decode_arrays(bad, ["a.safetensors"])
        assert info.value.reason == why


def test_batches_hold_them_and_bad_ones_are_quarantined(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train") as writer:
        for i in range(12):
            value: Any = np.full((2, 2), i, np.float32)
            data = saved(np.array([Bomb()], dtype=object), allow_pickle=True) if i == 5 else saved(value)
            record = json.dumps({"caption": str(i)}).encode()
            writer.add(f"s{i}", {"png": png((i, i, i)), "json": record, "depth.npy": data, "pyd": b"x", "pkl": b"y"})
    Manifest(name="x", shards=tuple(writer.shards), folder=tmp_path).write()
    listed = tmp_path / "q.jsonl"
    config = DataConfig(path=str(tmp_path), size=8, arrays=("depth.npy",), quarantine=str(listed), max_bad=0.5)
    loader = Loader(config, seed=0, micro_batch=4)
    for step in range(6):
        batch = loader.batch(step, 0)
        assert batch["depth"].shape == (4, 2, 2)
        assert batch["depth"][:, 0, 0].tolist() == [float(k[1:]) for k in batch["key"]]
        assert "s5" not in batch["key"]
    assert json.loads(listed.read_text())["reason"] == "object_array"
    assert json.loads(listed.read_text())["key"] == "s5"
    assert not Bomb.ran
    with pytest.raises(ValueError, match=r"arrays: 'x.pkl' is not a .npy or .safetensors member"):
        DataConfig(path="x", arrays=("x.pkl",))


def test_samples_that_disagree_are_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train") as writer:
        for i in range(2):
            writer.add(f"s{i}", {"png": png((1, 1, 1)), "txt": b"x", "npy": saved(np.zeros(i + 1))})
    Manifest(name="x", shards=tuple(writer.shards), folder=tmp_path).write()
    with pytest.raises(ValueError, match=r"arrays: sample 's\d' has .*they must agree"):
        Loader(DataConfig(path=str(tmp_path), arrays=("npy",)), seed=0, micro_batch=2).batch(0, 0)
