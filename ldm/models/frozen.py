"""Weights that do not train, stored in bfloat16, 8 or 4 bits and made whole where they are used.

What is stored so are the weights of linear layers, convolutions and embeddings, and the joint one of query, key and
value of `nn.MultiheadAttention`. Biases and norms stay, SD3's table of positions becomes float16. int8: each
output's row is 8-bit integers times its scale, the largest absolute value over 127. nf4: 4-bit NormalFloat in blocks of
64 values (Dettmers 2023, arXiv 2305.14314), by bitsandbytes. Embeddings have 8 bits where others have 4.

A layer's weight is whole, in the type that is computed in, while the layer runs. Autograd keeps what is stored in its
place, and makes the weight whole again in the backward pass.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ldm.models.casts import autocast_dtype
from ldm.models.network import Network

Storage = Literal["fp32", "bf16", "int8", "nf4"]
BLOCK = 64
"""Values of nf4 that share a scale."""
TABLE = "pos_embed"


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (O, ...) as int8 of the same shape, and its rows' scales (O, 1, ...) in float32."""
    whole = weight.float()
    largest = whole.abs().amax(dim=tuple(range(1, whole.ndim)), keepdim=True)
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (whole / scale).round().to(torch.int8), scale


def bitsandbytes(key: str) -> Any:
    """The package. Raises ValueError, which begins with `key`, where it is missing."""
    noise = logging.getLogger("bitsandbytes.backends.cpu.ops")  # of a kernel for inference, which nothing here uses
    level = noise.level
    noise.setLevel(logging.ERROR)
    try:
        import bitsandbytes as package  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError:
        raise ValueError(f"{key} needs the package bitsandbytes: pip install 'ldm[bitsandbytes]'") from None
    finally:
        noise.setLevel(level)
    return package


def check_storage(storage: str) -> None:
    """Raise ValueError where this storage of weights needs a package that is missing."""
    if storage == "nf4":
        bitsandbytes("train.engine.frozen: 'nf4'")


def of_autoencoder(storage: Storage) -> Storage:
    """What an autoencoder is stored in beside others: 8 bits at the least.

    With 4 its latents are wrong by an eighth of their spread; with 8 they are as near as bfloat16 computes them.
    """
    return "int8" if storage == "nf4" else storage


def _packed(weight: Tensor, storage: Storage) -> tuple[Tensor, Tensor | None]:
    """What is stored of a weight, and its scales if it has any."""
    if storage == "bf16":
        return weight.to(torch.bfloat16), None
    if storage == "int8":
        return rounded(weight)
    if weight.is_meta:  # a plan's, which needs no package
        count = weight.numel()
        return weight.new_empty(-(-count // 2), dtype=torch.uint8), weight.new_empty(-(-count // BLOCK))
    functional = bitsandbytes("train.engine.frozen: 'nf4'").functional
    flat = weight.float().contiguous().flatten()
    data, state = functional.quantize_4bit(flat, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    return data, state.absmax


def _whole(data: Tensor, scale: Tensor | None, storage: Storage, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Undo `_packed`, in a type; `data` itself where it is of that type."""
    if scale is None:
        return data.to(dtype)
    if storage == "int8":
        return (data * scale).to(dtype)
    if data.is_meta:
        return data[:, None].expand(-1, 2).to(dtype).flatten()[: shape.numel()].view(shape)
    functional = bitsandbytes("train.engine.frozen: 'nf4'").functional
    count = shape.numel()  # as rows of a block, for which its kernel is quick whatever the weight's last axis
    rows = torch.Size((count // BLOCK, BLOCK) if count % BLOCK == 0 else (count,))
    state = functional.QuantState(absmax=scale, shape=rows, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    return functional.dequantize_4bit(data, state).view(shape)


class Stored(nn.Module):
    """Mixed into a layer's class by `store`: its weights are properties, which give them whole.

    Reading one is dear outside of `opened`. The state dict holds whole weights, in float32; it cannot be loaded.
    """

    _kinds: dict[str, tuple[Storage, torch.Size]]
    _open: dict[str, Tensor]

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """A weight in a type, without gradient; what is stored itself where it is of this type."""
        storage, shape = self._kinds[name]
        return _whole(self._data(name), self._buffers.get(f"{name}_scale"), storage, shape, dtype)

    def _data(self, name: str) -> Tensor:
        return cast("Tensor", self._buffers[f"{name}_data"])

    def computed(self, name: str) -> torch.dtype:
        """What a layer computes in: autocast's type, float32 without."""
        return autocast_dtype(self._data(name)) or torch.float32

    def forward(self, *args: Any, **options: Any) -> Any:
        if isinstance(self, nn.Embedding):
            rows, scale = self._data("weight")[args[0]], self._buffers.get("weight_scale")
            return rows.float() if scale is None else rows * scale[args[0]]
        with opened(self):
            return super().forward(*args, **options)

    def _apply(self, fn: Any, recurse: bool = True) -> Stored:
        """Moves what is stored, and keeps its types."""
        before = {f"{name}_{part}": self._buffers.get(f"{name}_{part}") for name in self._kinds for part in _PARTS}
        super()._apply(fn, recurse)
        for name, value in before.items():
            if value is not None and (now := cast("Tensor", self._buffers[name])).dtype != value.dtype:
                self._buffers[name] = value.to(now.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination |= {prefix + name: self.whole(name, torch.float32) for name in self._kinds}


_PARTS = ("data", "scale")


@contextlib.contextmanager
def opened(module: nn.Module) -> Iterator[None]:
    """Inside, the stored weights of a module and of those below it are whole, made once.

    What autograd keeps of them is made again in the backward pass. Compiled code does neither.
    """
    if torch.compiler.is_compiling():
        yield
        return
    made: list[tuple[Stored, str]] = []
    known: dict[int, tuple[Stored, str]] = {}
    below = [m for m in module.modules() if isinstance(m, Stored) and not isinstance(m, nn.Embedding)]
    for layer, name in [(m, name) for m in below for name in m._kinds if name not in m._open]:
        layer._open[name] = value = layer.whole(name, layer.computed(name))
        made.append((layer, name))
        if value is not layer._data(name):
            known[value.untyped_storage()._cdata] = layer, name

    hooked = bool(known) and torch.is_grad_enabled()
    try:
        with _kept_as_stored(known) if hooked else contextlib.nullcontext():
            yield
    finally:
        for layer, name in made:
            del layer._open[name]


def _kept_as_stored(known: dict[int, tuple[Stored, str]]) -> contextlib.AbstractContextManager[Any]:
    """Inside, autograd keeps layer and name in the place of these weights, by their storages; others as it did before.

    What hooks are there already, of gradient checkpointing that keeps nothing, are asked for the others.
    """
    torch_own: Any = torch._C
    outer = torch_own._autograd._top_saved_tensors_default_hooks(False)  # as torch.utils.checkpoint asks for them
    kept, back = outer or (
        Tensor.detach,
        lambda tensor: tensor,
    )  # not itself: an output that keeps itself is never freed

    def pack(saved: Tensor) -> tuple[Any, ...]:
        found = known.get(saved.untyped_storage()._cdata)
        if found is None:
            return None, kept(saved)
        return found, saved.dtype, saved.size(), saved.stride(), saved.storage_offset()

    def unpack(packed: tuple[Any, ...]) -> Tensor:
        found, first, *view = packed
        if found is None:
            return back(first)
        layer, name = found
        return layer.whole(name, first).as_strided(*view)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _weight(name: str) -> property:
    def read(self: Stored) -> Tensor:
        found = self._open.get(name)
        return self.whole(name, self.computed(name)) if found is None else found

    return property(read)


@functools.cache
def _class(of: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A layer's class with these weights stored; it has the layer's name, which tables of operations show."""
    body: dict[str, Any] = {name: _weight(name) for name in names}
    return type(of.__name__, (Stored, of), body | {"__module__": of.__module__})


def _names(module: nn.Module) -> list[str]:
    """The weights of a module that are stored otherwise, none of which trains."""
    if isinstance(module, nn.MultiheadAttention):
        names = ["in_proj_weight"] if module.in_proj_weight is not None else []
    elif isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)):
        names = ["weight"]
    else:
        names = []
    return [] if isinstance(module, Stored) else [n for n in names if not module.get_parameter(n).requires_grad]


def _storages(module: nn.Module, storage: Storage) -> Iterator[tuple[nn.Module, str, Storage]]:
    """(layer, weight, what it is stored in), for all that is not stored as it is."""
    inside = None
    if isinstance(module, Network):
        inside = {id(layer) for _, block in module.blocks() for layer in block.modules()}
    for layer in list(module.modules()) if storage != "fp32" else []:
        how: Storage = "int8" if isinstance(layer, nn.Embedding) and storage == "nf4" else storage
        for name in _names(layer):
            yield layer, name, how if inside is None or id(layer) in inside else "bf16"


@torch.no_grad()
def store(module: nn.Module, storage: Storage, device: str | torch.device | None = None) -> None:
    """Store a module's weights that do not train, in place, on a device (None: where they are).

    They are moved one by one, so that the device never holds them whole together. Of a denoising network those outside
    of its blocks (the first and last layers, and what embeds times and texts) are in bfloat16 where others have 8 or 4
    bits. Weights that are used in two places are stored once. Raises ValueError without the package of nf4.
    """
    if any(not p.is_meta for p in module.parameters()):
        check_storage(storage)
    done: dict[int, tuple[nn.Parameter, tuple[Tensor, Tensor | None]]] = {}
    for layer, name, how in _storages(module, storage):
        weight = layer.get_parameter(name)
        if id(weight) not in done:
            value = weight.detach()
            done[id(weight)] = weight, _packed(value if device is None else value.to(device), how)
        data, scale = done[id(weight)][1]
        _replace(layer, name, how, weight.shape, data, scale)
    for layer, table in _tables(module, storage):
        layer._buffers[TABLE] = table.half()
    if device is not None:
        module.to(device)


def _replace(
    layer: nn.Module, name: str, storage: Storage, shape: torch.Size, data: Tensor, scale: Tensor | None
) -> None:
    del layer._parameters[name]
    layer.register_buffer(f"{name}_data", data, persistent=False)
    if scale is not None:
        layer.register_buffer(f"{name}_scale", scale, persistent=False)
    layer.__dict__["_kinds"], layer.__dict__["_open"] = {name: (storage, shape)}, {}
    layer.__class__ = _class(type(layer), (name,))


def _tables(module: nn.Module, storage: Storage) -> list[tuple[nn.Module, Tensor]]:
    """Modules with SD3's table of positions, a tenth of its weights; it has float16 in the published files."""
    if storage == "fp32":
        return []
    return [(m, table) for m in module.modules() if (table := m._buffers.get(TABLE)) is not None]


def stored_bytes(module: nn.Module, storage: Storage) -> int:
    """Bytes of all of a module's weights once `store` went over it, without doing so: of one on the meta device too."""
    total = 0
    seen: dict[int, Tensor] = {}
    for layer, name, how in _storages(module, storage):
        weight = layer.get_parameter(name)
        if id(weight) not in seen:
            seen[id(weight)] = weight
            total += _bytes(weight.shape, how)
    for _, table in _tables(module, storage):
        seen[id(table)] = table
        total += 2 * table.numel()
    for value in (*module.parameters(), *module.buffers()):
        if id(value) not in seen:
            seen[id(value)] = value
            total += value.numel() * value.element_size()
    return total


def _bytes(shape: torch.Size, storage: Storage) -> int:
    count = shape.numel()
    if storage == "int8":
        return count + 4 * shape[0]
    return 2 * count if storage == "bf16" else -(-count // 2) + 4 * -(-count // BLOCK)


def held_bytes(module: nn.Module) -> int:
    """Bytes that a module's weights and tables take, each storage once."""
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers())}
    return sum(held.values())
