"""LoRA files both ways: diffusers' and PEFT's `pytorch_lora_weights.safetensors`, and kohya's single file.

Read are these and what other tools write: LyCORIS' LoCon, LoHa, LoKr, DoRA, whole differences and norms, OneTrainer's
names and bundled embeddings, XLabs' and the authors' of FLUX.1, PEFT's folders, pickled files that hold no code.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.adapters.base import COMPONENTS
from ldm.adapters.corrections import Correction, Corrections
from ldm.adapters.lora import to_peft
from ldm.adapters.low_rank import Lora, LowRank, as_plain
from ldm.adapters.sites import Site, all_sites, other_sites
from ldm.checkpoint import weights
from ldm.checkpoint.lora_families import foreign, known_names, kohya_layers, kohya_names, kohyas_own, names_of, of_t5
from ldm.checkpoint.lora_layers import Layer, joined, rows_of
from ldm.checkpoint.lora_names import Named, plain, split
from ldm.checkpoint.lora_parts import Misfit, assemble
from ldm.checkpoint.lora_settings import PEFT_FILES, Settings, header_alpha, settings_of
from ldm.models.families import family_of
from ldm.models.network import Network
from ldm.models.networks import AnyNetwork
from ldm.models.shipped import named as shipped
from ldm.models.text import TextEncoder

__all__ = [
    "LoraFile",
    "is_lora",
    "kohya_holds",
    "kohya_names",
    "locate_lora",
    "read_adapter",
    "read_lora",
    "write_lora",
]

log = logging.getLogger(__name__)
NAME = "pytorch_lora_weights.safetensors"
FIT_RANK = 64
"""Rank of the plain products that stand for what a form cannot hold, such as DoRA in kohya's."""
Format = Literal["diffusers", "kohya"]
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
LYCORIS = "lycoris.safetensors"
_NAMES = (NAME, "pytorch_lora_weights.bin", *PEFT_FILES, "lora.safetensors", LYCORIS)
_FOLDERS = ("unet", "transformer", *COMPONENTS)
_BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(clip_l|clip_g|string_to_param\.\*|emb_params)$")


@dataclass(frozen=True)
class LoraFile:
    """What a file holds: corrections by our layers' names, and token embeddings that OneTrainer puts beside them."""

    corrections: dict[str, Correction] = field(default_factory=dict)
    embeddings: dict[str, list[Tensor]] = field(default_factory=dict)


def write_lora(
    path: Path,
    lora: Corrections,
    config: AnyNetwork,
    *,
    form: Format = "diffusers",
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
    sites: Mapping[str, Site] | None = None,
    rank: int = FIT_RANK,
) -> None:
    """Write one file; `config` is the base network's, since kohya's names depend on it.

    What a form cannot hold (in kohya's DoRA, in both LoHa, LoKr, OFT) is written as plain products of at most
    `rank`, which needs the base's `sites`; layers that its readers ignore are left out. Both are said. Raises
    ValueError where nothing is left.
    """
    if form == "kohya" and names_of(config).header is None:
        raise ValueError(f"{path}: kohya's scripts know no {family_of(config).title}; write form 'diffusers'")
    held = _held(path, lora, form, sites, rank)
    notes = {"format": "pt", **(metadata or {})}
    if form == "diffusers":
        tensors = to_peft(held)
    else:
        layers = _kohya_layers(held, config)
        tensors = to_kohya(layers)
        notes |= _kohya_notes(layers, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().to("cpu", dtype).contiguous() for k, v in tensors.items()}, path, metadata=notes)


def kohya_holds(lora: Corrections, path: Path, config: AnyNetwork | None = None) -> bool:
    """Whether kohya's form holds any of these layers of a network; an empty file is left out with a word."""
    if any(kohyas_own(n, config) and len(low.shape) > 1 for n, low in lora.items()):
        return True
    log.warning("%s: left out, since kohya's scripts know none of these layers, such as %s", path, next(iter(lora), ""))
    return False


def _held(path: Path, lora: Corrections, form: Format, sites: Mapping[str, Site] | None, rank: int) -> Lora:
    """The corrections as the form can hold them."""
    left = [n for n, low in lora.items() if len(low.shape) < 2 or (form == "kohya" and not kohyas_own(n))]
    kept = {n: low for n, low in lora.items() if n not in left}
    if not kept:
        raise ValueError(f"{path}: form {form!r} holds none of these {len(lora)} layers, such as {left[:1]}")
    if left:
        why = "which kohya's scripts ignore" if form == "kohya" else "which this form cannot hold"
        log.warning("%s: left out %s, %s", path, weights.listed(left, 6), why)

    def whole(low: Correction) -> bool:
        return isinstance(low, LowRank) and (low.magnitude is None or (form == "diffusers" and low.axis == 0))

    odd = {n: low for n, low in kept.items() if not whole(low)}
    fitted: Lora = {}
    if odd:
        if sites is None:
            raise ValueError(f"{path}: form {form!r} needs the base's weights for {next(iter(odd))} and others")
        fitted, errors = as_plain(odd, sites, rank)
        off, size = (sum(e[i] ** 2 for e in errors.values()) ** 0.5 for i in (0, 1))
        log.warning(
            "%s: %d layers of DoRA, LoHa, LoKr or OFT are written as plain products of rank %d at most, since %s; "
            "relative error of the change %.2g", path, len(odd), rank,
            "kohya's scripts read no magnitudes and ComfyUI divides by another norm" if form == "kohya"
            else "PEFT has another form for them", off / size if size else 0.0,
        )  # fmt: skip
    plain_ones = {n: low for n, low in kept.items() if isinstance(low, LowRank)} | fitted
    return {n: plain_ones[n] for n in kept}


def read_lora(
    path: str | Path, network: Network, text: Sequence[TextEncoder], *, lenient: bool = False
) -> dict[str, Correction]:
    """The corrections of a file, as `read_adapter` reads them."""
    return read_adapter(path, network, text, lenient=lenient).corrections


def read_adapter(path: str | Path, network: Network, text: Sequence[TextEncoder], *, lenient: bool = False) -> LoraFile:
    """A file of any of these forms, a folder that holds one, or a run, under this model's layer names.

    Tensors that fit no layer are refused, or with `lenient` left out and named as long as others fit. Raises ValueError
    for a file that is none of these forms or is damaged.
    """
    found, embeddings = LoraFile(), {}
    for file in locate_lora(path):
        one = _read_file(file, network, text, lenient)
        found.corrections.update(one.corrections)
        embeddings |= one.embeddings
    return LoraFile(found.corrections, embeddings)


def locate_lora(path: str | Path) -> list[Path]:
    """The files of a LoRA: one, or one for each component of a folder that PEFT wrote. Raises ValueError for none."""
    path = shipped(path)
    where = f"LoRA {str(path)!r}"
    if path.is_file():
        if path.suffix.lower() not in _SUFFIXES:
            raise ValueError(f"{where}: expected a file that ends in {', '.join(_SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise ValueError(f"{where}: no such .safetensors file, nor a folder that holds {NAME}")
    for folder in (path, path / "export", path / "lora"):
        for name in _NAMES:
            if (folder / name).is_file():
                return [folder / name]
        parts = [folder / c / n for c in _FOLDERS for n in PEFT_FILES if (folder / c / n).is_file()]
        if parts:
            return parts
    if (path / "export" / "model_index.json").is_file() or (path / "model_index.json").is_file():
        raise ValueError(f"{where}: holds a whole model, no LoRA; give it as --model")
    if (path / "checkpoints").is_dir() and not (path / "export").is_dir():
        raise ValueError(f"{where}: not exported yet; the export is written when training ends")
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith("."))
    if len(files) == 1:
        return files
    many = f"; it holds {[p.name for p in files[:4]]}: give one of them" if files else ""
    raise ValueError(f"{where}: no {NAME} in it{many}")


def is_lora(path: str | Path) -> bool:
    """Whether this is a LoRA's file, or a folder that holds one and no model; false where there is nothing."""
    found = shipped(path)
    if found.is_file() and found.suffix.lower() in _SUFFIXES:
        names = [split(k) for k in weights.open_file(found)]
        return sum(n is not None for n in names) > len(names) / 2
    if not found.is_dir() or any((found / n).exists() for n in ("model_index.json", "export", "checkpoints")):
        return False
    return any((found / n).is_file() for n in _NAMES) and not (found / "adapter.json").is_file()


def _read_file(path: Path, network: Network, text: Sequence[TextEncoder], lenient: bool) -> LoraFile:
    where = f"LoRA {str(path)!r}"
    source, notes = weights.open_file(path, prefix="LoRA "), weights.metadata(path)
    own = all_sites(network, text) | other_sites(network, text)
    names = known_names(own, network.config)
    component = f"{path.parent.name}." if path.name in PEFT_FILES and path.parent.name in _FOLDERS else ""
    parts: dict[str, dict[str, Tensor]] = {}
    bundled: dict[str, dict[str, Tensor]] = {}
    keys: dict[str, list[str]] = {}
    unknown, adapters = [], set()
    for key, value in weights.read_all(source, where=where).items():
        if match := _BUNDLED.match(key):
            bundled.setdefault(match[1], {})[match[2]] = value.float().view(-1, value.shape[-1])
            continue
        named = split(key)
        layer = None if named is None else plain(component + named.layer)
        if named is None or layer not in names or not (value.is_floating_point() or named.part == "alpha"):
            unknown.append(key)
            continue
        adapters |= {named.adapter} - {""}
        _put(parts.setdefault(layer, {}), named, value.float(), key, where)
        keys.setdefault(layer, []).append(key)
    if len(adapters) > 1:
        raise ValueError(f"{where}: holds the adapters {sorted(adapters)}; one a file is read")
    told = any("alpha" in p for p in parts.values())
    settings = settings_of(path, notes, any(k.startswith("base_model.model.") for k in source), told)
    if not told:
        header_alpha(notes, path)
    found: dict[str, Correction] = {}
    misfits = []
    for name, own_parts in parts.items():
        try:
            made = _made(names[name], own_parts, own, settings)
        except Misfit as error:
            misfits.append(str(error))
            unknown += keys[name]
            continue
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if twice := sorted(set(made) & set(found)):
            raise ValueError(f"{where}: {keys[name][0]!r} corrects {twice[0]}, which is there under another name too")
        found |= made
    widths = {k: e.shape[1] for k, e in source.items() if len(e.shape) > 1}
    other, over = foreign(widths, network.config), _trained_over(path, notes)
    _say_unknown(where, unknown, misfits, len(source), lenient, other, over)
    return LoraFile(found, {k: _bundle(v) for k, v in bundled.items()})


def _made(layer: Layer, parts: dict[str, Tensor], own: Mapping[str, Site], settings: Settings) -> dict[str, Correction]:
    """The corrections of the sites that a file's layer is. Raises Misfit where a shape is not the model's."""
    sites = [own[p] for p in layer.parts]
    shape = (sum(len(s.read()) for s in sites), *sites[0].read().shape[1:])
    if "whole" in parts:
        whole = parts["whole"]
        if whole.shape != shape:
            raise Misfit(
                f"{layer.parts[0]} has shape {tuple(whole.shape)}, the model's is {shape}: another base model?"
            )
        parts = {**parts, "diff": whole - sites[0].read().float().to(whole.device)}
        del parts["whole"]
    name = layer.parts[0]
    made = assemble(name, parts, shape, settings)
    if layer.plain:
        return _checked(made, own)
    found: dict[str, Correction] = {}
    for part, spans in zip(layer.parts, layer.spans(shape[0]), strict=True):
        for suffix in ("", ".bias"):
            if (low := made.get(name + suffix)) is not None:
                if low.shape[0] != shape[0]:
                    raise Misfit(
                        f"{name}{suffix} has {low.shape[0]} outputs, the model's {shape[0]}: another base model?"
                    )
                found[part + suffix] = rows_of(low, spans)
    return _checked(found, own)


def _put(parts: dict[str, Tensor], named: Named, value: Tensor, key: str, where: str) -> None:
    if named.part in parts:
        raise ValueError(f"{where}: {key!r} is there under two names")
    parts[named.part] = value


def _checked(found: dict[str, Correction], sites: Mapping[str, Site]) -> dict[str, Correction]:
    """The same; Misfit where a bias is corrected that the model lacks or has in another length."""
    for name, low in found.items():
        shape = tuple(sites[name].read().shape) if name in sites else None
        if low.shape != shape:
            raise Misfit(f"{name} has shape {low.shape}, the model's is {shape}: another base model?")
    return found


def _bundle(rows: Mapping[str, Tensor]) -> list[Tensor]:
    return [rows[k] for k in ("clip_l", "clip_g") if k in rows] or [next(iter(rows.values()))]


def _trained_over(path: Path, notes: Mapping[str, str]) -> str:
    """The base that a file's run or its header names, "" where none does."""
    about = path.parent / "adapter.json"
    with contextlib.suppress(OSError, ValueError):
        told = json.loads(about.read_text(encoding="utf-8"))
        if isinstance(told, dict) and isinstance(told.get("base"), str):
            return told["base"]
    name = notes.get("ss_sd_model_name", "")
    return "" if name == "None" else name


def _say_unknown(
    where: str, unknown: list[str], misfits: list[str], total: int, lenient: bool, other: str, over: str
) -> None:
    """Raise for tensors that fit nothing; with `lenient` name them, as long as some fit.

    `other`: as `foreign` says; `over`: the base that the file was trained over, as far as it tells.
    """
    if not unknown:
        return
    fit = total - len(unknown)
    why = misfits[0] if misfits else f"{unknown[0]!r} names no layer of this model; is it for another base model?"
    if of_t5(unknown) and not misfits:
        misfits, why = [*misfits, ""], "this model has no T5 that it fits (one of 8 bits takes none)"
    if other:
        misfits, why = [*misfits, ""], other
    why += f"; it was trained over {over!r}" if over else ""
    if not fit:
        raise ValueError(f"{where}: none of its {total} tensors fits this model: {why}")
    names = weights.listed(sorted(unknown), 12 if lenient else 3)
    rest = f"{fit} of {total} tensors fit this model; not used: {names}"
    if not lenient:
        more = f" ({why})" if misfits else ""
        raise ValueError(f"{where}: {rest}{more}; --lenient (lenient=True in Python) loads those that fit")
    log.warning("%s: %s", where, rest)


def _kohya_layers(lora: Lora, config: AnyNetwork) -> Lora:
    """The corrections under kohya's names of the layers, those of one of its layers joined."""
    return {key: joined(lora, layer) for key, layer in kohya_layers(lora, config).items()}


def to_kohya(layers: Lora) -> dict[str, Tensor]:
    """Tensors under kohya's names, with alpha; of plain corrections, since its scripts read no magnitudes."""
    out = {}
    for key, low in layers.items():
        if "_final_layer_" in key:  # diffusers' reader leaves out the alpha of these
            low = LowRank(low.down, low.up * low.scale, float(low.rank))
        out[f"{key}.lora_down.weight"] = low.down
        out[f"{key}.lora_up.weight"] = low.up
        out[f"{key}.alpha"] = torch.tensor(low.alpha)
    return out


def _kohya_notes(layers: Lora, config: AnyNetwork) -> dict[str, str]:
    """The header that kohya's tools and the web pages read."""
    lows, header = list(layers.values()), names_of(config).header
    assert header is not None
    ranks, alphas = {x.rank for x in lows}, {x.alpha for x in lows}
    notes = {
        "ss_network_dim": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(max(alphas)) if len(alphas) == 1 else "Dynamic",
        **header(config),
    }
    convolutions = [x for x in lows if x.down.ndim == 4 and x.down.shape[-1] > 1]
    if convolutions:
        arguments = {"conv_dim": str(convolutions[0].rank), "conv_alpha": str(convolutions[0].alpha)}
        notes["ss_network_args"] = json.dumps(arguments)
    return notes
