"""Weights in files, tensor by tensor: safetensors in one file or several, and pickled ones that hold no code.

A `Source` knows names, shapes and types without reading the tensors; `write` asks for one tensor at a time, so that
converting needs the memory of a few tensors and not of a file.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.checkpoint.downloads import instead
from ldm.checkpoint.pickled import named_tensors, read_pickled
from ldm.checkpoint.settings import read_json

log = logging.getLogger(__name__)
SHARD_BYTES = 10 * 1000**3
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {v: k for k, v in _TYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor that is not read yet."""

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return self.shape.numel() * self.dtype.itemsize


Source = Mapping[str, Entry]


def of_state(state: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Tensors in memory as a source."""
    return {k: Entry(v.shape, v.dtype, lambda v=v: v.detach()) for k, v in state.items()}


def shapes(source: Source) -> dict[str, torch.Size]:
    """Name -> shape."""
    return {k: e.shape for k, e in source.items()}


def read_all(source: Source, dtype: torch.dtype | None = None, where: str = "weights") -> dict[str, Tensor]:
    """All tensors in memory of their own, floating-point ones as `dtype`.

    Raises ValueError naming `where` and those that hold NaN or infinity, as `dtype` or before.
    """
    found = {k: cast(e.read(), dtype, copy=True) for k, e in source.items()}
    if bad := [k for k, v in found.items() if not finite(v)]:
        raise ValueError(f"{where}: not numbers (NaN or infinity) in {listed(bad, 4)}; the weights are damaged")
    return found


def finite(tensor: Tensor) -> bool:
    """Whether no number in it is NaN or infinite."""
    if not tensor.is_floating_point():
        return True
    whole = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool(torch.isfinite(whole).all())


def cast(tensor: Tensor, dtype: torch.dtype | None, copy: bool = False) -> Tensor:
    """`tensor` as `dtype` if it is floating-point and a type is given."""
    return tensor.to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype, copy=copy)


SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def open_file(path: Path, *, prefix: str = "") -> dict[str, Entry]:
    """The tensors of a `.safetensors`, `.ckpt`, `.pt`, `.pth` or `.bin` file, whichever of both forms it really has.

    Names lose what compiling and data parallelism put before them. Raises ValueError naming the file (behind `prefix`)
    if it is missing, damaged, of another kind, or holds code.
    """
    if not path.is_file():
        raise ValueError(f"{prefix}{path}: no such file")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{prefix}{path}: expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    try:
        if is_pickled(path):
            if what := instead(path):
                raise ValueError(f"{path}: not readable as weights: {what}")
            return plain_names(of_state(named_tensors(read_pickled(path), path)))
        return unscaled(plain_names(_open_safetensors(path)), path)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from error


def is_pickled(path: Path) -> bool:
    """Whether the file begins as torch's do; one that is neither form is taken for what its name says."""
    with path.open("rb") as file:
        start = file.read(16)
    if start[8:9] == b"{":
        return False
    return start[:4] == b"PK\x03\x04" or start[:1] == b"\x80" or path.suffix.lower() != ".safetensors"


def plain_names(source: Source) -> dict[str, Entry]:
    """Without `_orig_mod.` of compiled models and a `module.` before all names."""
    out = {re.sub(r"(^|\.)_orig_mod\.", r"\1", k): e for k, e in source.items()}
    while out and all(k.startswith("module.") for k in out):
        out = {k.removeprefix("module."): e for k, e in out.items()}
    return out


_FACTORS = (".scale_weight", ".weight_scale")
_ASIDE = (".scale_input", ".input_scale", ".comfy_quant")
"""Names in ComfyUI's files of scaled float8: of factors, in its first and its second form, and of what only its own
computing in float8 needs."""
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def unscaled(source: Source, path: Path) -> dict[str, Entry]:
    """With the factors that ComfyUI's scaled float8 files keep beside the weights multiplied in.

    Raises ValueError for a factor without its weight, and for weights of another kind than float8 (blocks of 4 or 8
    bits), naming it.
    """
    factors = [k for k in source if k.endswith(_FACTORS)]
    marked = any(k.rpartition(".")[2] == "scaled_fp8" for k in source)
    if not marked and not any(f"{k.rpartition('.')[0]}.weight" in source for k in factors):
        return dict(source)

    def scaled(weight: Entry, factor: Entry) -> Entry:
        def read() -> Tensor:
            rows = factor.read().float()
            rows = rows if rows.numel() == 1 else rows.reshape(-1, *[1] * len(weight.shape[1:]))
            return weight.read().float() * rows

        return Entry(weight.shape, torch.float32, read)

    out = {k: e for k, e in source.items() if not k.endswith((*_FACTORS, *_ASIDE)) and not k.endswith("scaled_fp8")}
    for key in factors:
        own = key.rpartition(".")[0] + ".weight"
        if own not in out:
            raise ValueError(f"{path}: {key!r} scales a weight that is not there")
        weight, factor = out[own], source[key]
        if (weight.dtype not in _FLOAT8 and not marked) or factor.shape.numel() not in (1, *weight.shape[:1]):
            kind = str(weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"{path}: {own!r} is {kind} with factors of shape {list(factor.shape)}: of scaled weights only float8 "
                "with one factor a tensor or a row is read"
            )
        out[own] = scaled(weight, factor)
    return out


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says about itself; empty for other kinds."""
    return {} if is_pickled(path) else dict(_header(path)[0].get("__metadata__") or {})


def _open_safetensors(path: Path) -> dict[str, Entry]:
    try:
        with safe_open(str(path), framework="pt", device="cpu"):  # checks the header against the size of the file
            header, start = _header(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {_damage(path) or error}") from error
    header.pop("__metadata__", None)
    out = {}
    for name, about in header.items():
        if about["dtype"] not in _TYPES:
            raise ValueError(f"{path}: {name!r} has type {about['dtype']}; known are {sorted(_TYPES)}")
        shape, dtype = torch.Size(about["shape"]), _TYPES[about["dtype"]]
        read = functools.partial(_read_tensor, path, start + about["data_offsets"][0], shape, dtype)
        out[name] = Entry(shape, dtype, read)
    return out


def _read_tensor(path: Path, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Read into new memory: a mapped file's pages would stay and count as this process's."""
    out = torch.empty(shape, dtype=dtype)
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        flat: Any = out.reshape(-1).view(torch.uint8).numpy() if out.numel() else b""
        left = memoryview(flat)
        while left:
            count = file.readinto(left)
            if not count:
                raise ValueError(f"{path}: ended while it was read")
            left = left[count:]
    return out


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the data begin."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"a header of {length} bytes")
        return json.loads(file.read(length)), 8 + length


def _damage(path: Path) -> str | None:
    """What is wrong with a safetensors file that cannot be read, as far as its beginning and its size tell."""
    if what := instead(path):
        return what
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and 8 + int.from_bytes(start[:8], "little") > size:
        return f"it ends after {size} bytes, within its header; download or copy it again"
    try:
        header, begin = _header(path)
        end = begin + max((e["data_offsets"][1] for k, e in header.items() if k != "__metadata__"), default=0)
    except (ValueError, struct.error, KeyError, TypeError, OSError, MemoryError, OverflowError):
        return None
    if size < end:
        return f"it ends after {size} of {end} bytes; download or copy it again"
    return f"{size - end} bytes stand behind its last tensor" if size > end else None


def open_folder(folder: Path, stem: str, variant: str | None = None) -> dict[str, Entry]:
    """The tensors of `stem`.safetensors, or of its shards, in a folder; `variant` such as "fp16" is part of the names.

    Without a variant the plain files are used, or the only variant there is. Raises ValueError for none, and for
    shards that are missing or disagree with their index.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    for name in [variant] if variant else [None, *_variants(folder, stem)]:
        dot = f".{name}" if name else ""
        whole = folder / f"{stem}{dot}.safetensors"
        index = folder / f"{stem}.safetensors.index{dot}.json"
        if whole.is_file() or index.is_file():
            if name and not variant:
                log.info("%s: using variant %s, the only one there", folder, name)
            return _bare(open_file(whole) if whole.is_file() else _open_shards(folder, index))
    dot = f".{variant}" if variant else ""
    for name in (f"{stem}{dot}.bin", f"pytorch_{stem}{dot}.bin"):  # as before safetensors; read without running code
        if (folder / name).is_file():
            return _bare(open_file(folder / name))
        if (index := folder / name.replace(f"{dot}.bin", f".bin.index{dot}.json")).is_file():
            return _bare(_open_shards(folder, index))
    there = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)
    hint = f"; it holds {', '.join(there[:3])}" if there else ""
    raise ValueError(f"{folder}: no {stem}{dot}.safetensors{hint}")


def _bare(source: dict[str, Entry]) -> dict[str, Entry]:
    """One module's tensors without the `model.` that a trainer's own class puts before all of them."""
    while source and all(k.startswith("model.") for k in source):
        source = {k.removeprefix("model."): e for k, e in source.items()}
    return source


def _variants(folder: Path, stem: str) -> list[str]:
    pattern = re.compile(re.escape(stem) + r"(?:\.(\w+)\.safetensors|\.safetensors\.index\.(\w+)\.json)$")
    found = [pattern.match(p.name) for p in sorted(folder.iterdir())]
    return [m[1] or m[2] for m in found if m]


def _open_shards(folder: Path, index: Path) -> dict[str, Entry]:
    where: dict[str, str] = read_json(index).get("weight_map", {})
    out: dict[str, Entry] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: {name!r} is not a file name")
        out |= open_file(folder / name)
    if set(out) != set(where):
        odd = sorted(set(out) ^ set(where))
        raise ValueError(f"{index}: {len(odd)} tensor(s) differ from the shards, such as {odd[0]!r}")
    return out


def write_folder(
    folder: Path,
    stem: str,
    source: Source,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """`stem`.safetensors, or shards with an index where it would be larger than `shard_bytes`."""
    dot = f".{variant}" if variant else ""
    groups: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in source.items():
        numbytes = entry.shape.numel() * _stored(entry.dtype, dtype).itemsize
        if groups[-1] and size + numbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = entry
        size += numbytes
    if len(groups) == 1:
        write_file(folder / f"{stem}{dot}.safetensors", source, dtype=dtype)
        return
    where = {}
    for i, group in enumerate(groups, 1):
        file = f"{stem}{dot}-{i:05d}-of-{len(groups):05d}.safetensors"
        write_file(folder / file, group, dtype=dtype)
        where |= dict.fromkeys(group, file)
    total = sum(e.shape.numel() * _stored(e.dtype, dtype).itemsize for e in source.values())
    about = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{stem}.safetensors.index{dot}.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def write_file(
    path: Path, source: Source, *, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, one tensor at a time, larger element types first as the format advises."""
    order = sorted(source, key=lambda k: (-_stored(source[k].dtype, dtype).itemsize, k))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name in order:
        kind = _stored(source[name].dtype, dtype)
        end = offset + source[name].shape.numel() * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": list(source[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            before = source[name].read()
            tensor = cast(before, dtype).contiguous().cpu()
            if not finite(tensor):
                where = "it does not fit into that type" if finite(before) else "the weights are damaged"
                raise ValueError(f"{path}: not numbers (NaN or infinity) in {name!r} as {tensor.dtype}: {where}")
            if tensor.shape != source[name].shape:
                raise ValueError(
                    f"{path}: {name!r} has shape {list(tensor.shape)}, {list(source[name].shape)} expected"
                )
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")


def _stored(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own


def listed(names: Sequence[str], most: int = 12) -> str:
    """A count and the first names, for messages."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} key(s): " + ", ".join(names[:most]) + rest


def alike(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes differ by ones at their end alone, as those of a linear layer and of a 1x1 convolution do."""
    return _cut(one) == _cut(other)


def _cut(shape: Sequence[int]) -> tuple[int, ...]:
    kept = list(shape)
    while len(kept) > 1 and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def reshaped(source: Source, expected: Mapping[str, torch.Size]) -> dict[str, Entry]:
    """The same tensors, with the ones at the end of their shapes that are expected."""

    def own(entry: Entry, shape: torch.Size) -> Entry:
        return Entry(shape, entry.dtype, lambda: entry.read().reshape(shape))

    wrong = {k for k, e in source.items() if k in expected and e.shape != expected[k] and alike(e.shape, expected[k])}
    return {k: own(e, expected[k]) if k in wrong else e for k, e in source.items()}


LENIENT = "--lenient (lenient=True in Python) leaves them out"


def check_keys(what: str, expected: Mapping[str, torch.Size], given: Mapping[str, torch.Size]) -> None:
    """Raise ValueError listing missing, extra and wrong-shaped keys."""
    problems = []
    if missing := sorted(set(expected) - set(given)):
        problems.append(f"missing {listed(missing)}")
    if extra := sorted(set(given) - set(expected)):
        fit = f"{len(given) - len(extra)} of {len(given)} tensors fit, {LENIENT}; " if not missing else ""
        problems.append(f"{fit}not known {listed(extra)}")
    both = sorted(set(expected) & set(given))
    if wrong := [f"{k} {list(given[k])} instead of {list(expected[k])}" for k in both if given[k] != expected[k]]:
        problems.append(f"wrong shape {listed(wrong)}")
    if problems:
        raise ValueError(f"{what}: " + "; ".join(problems))
