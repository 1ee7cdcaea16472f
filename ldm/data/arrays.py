"""Arrays stored beside a picture: npy and safetensors members, decoded without ever unpickling."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from ldm.data.decode import BadSample

SUFFIXES = ("npy", "safetensors")
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def check_names(names: Sequence[str]) -> None:
    """ValueError for a member that is not npy or safetensors."""
    for name in names:
        if name.rsplit(".", 1)[-1] not in SUFFIXES:
            raise ValueError(f"arrays: {name!r} is not a .npy or .safetensors member; nothing else is decoded")


def decode_arrays(members: Mapping[str, bytes], names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of the named members: `depth.npy` gives "depth", `t5.safetensors` "t5.NAME" of each in it.

    Integers become int64, other numbers float32. Raises BadSample no_array, object_array, not_numeric or damaged.
    """
    found: dict[str, Tensor] = {}
    for name in names:
        if name not in members:
            raise BadSample("no_array", f"no member {name}; has {sorted(members)}")
        stem, _, suffix = name.rpartition(".")
        stem = stem or suffix
        if suffix == "npy":
            found[stem] = _plain(torch.from_numpy(npy(members[name], name).copy()))
        else:
            try:
                tensors = safetensors.torch.load(members[name])
            except (SafetensorError, ValueError, KeyError) as error:
                raise BadSample("damaged", f"{name}: {error}") from error
            found |= {f"{stem}.{key}": _plain(value) for key, value in tensors.items()}
    return found


def npy(data: bytes, name: str = "npy") -> NDArray[np.generic]:
    """The array of an npy file, a view of its bytes. BadSample for objects, other kinds and damage.

    Reads the header itself: numpy would unpickle objects, or allocate what a forged shape asks for.
    """
    file = io.BytesIO(data)
    try:
        read = _HEADERS.get(np.lib.format.read_magic(file))
        if read is None:
            raise BadSample("damaged", f"{name}: npy format of another version")
        shape, fortran, dtype = read(file)
    except BadSample:
        raise
    except Exception as error:  # the header is parsed as Python literals, which raise many things
        raise BadSample("damaged", f"{name}: {type(error).__name__}: {error}") from error
    if dtype.hasobject:
        raise BadSample("object_array", f"{name}: holds pickled Python objects, which are never read")
    if dtype.kind not in "biuf":
        raise BadSample("not_numeric", f"{name}: dtype {dtype}")
    count, have = math.prod(shape), len(data) - file.tell()
    if any(n < 0 for n in shape) or count * dtype.itemsize != have:
        raise BadSample("damaged", f"{name}: {have} bytes for shape {shape} of {dtype}")
    values = np.frombuffer(data, dtype, offset=file.tell())
    values = values.reshape(shape, order="F" if fortran else "C")
    return values.astype(np.int64 if dtype.kind in "iu" else bool if dtype.kind == "b" else np.float32)


def stack(rows: Sequence[Mapping[str, Tensor]], keys: Sequence[str]) -> dict[str, Tensor]:
    """Batches (B, ...) of samples that must agree on names and shapes; ValueError names the sample that does not."""
    for row, key in zip(rows, keys, strict=True):
        have, first = ({n: tuple(v.shape) for n, v in r.items()} for r in (row, rows[0]))
        if have != first:
            raise ValueError(f"arrays: sample {key!r} has {have}, {keys[0]!r} has {first}; they must agree")
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _plain(value: Tensor) -> Tensor:
    if value.dtype == torch.bool:
        return value
    return value.float() if value.is_floating_point() else value.long()
