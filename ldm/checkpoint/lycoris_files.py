"""LoHa, LoKr and OFT as they are in files: LyCORIS' single file under kohya's names, and PEFT's folders.

LyCORIS' holds LoRA, DoRA, LoHa, LoKr and OFT beside each other; ComfyUI, the web pages and sd-scripts with LyCORIS read
it. PEFT's `LoHaConfig`, `LoKrConfig` and `OFTConfig` are one kind for each component.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.adapters.corrections import Correction, Corrections, Hadamard, Kronecker, Rotation
from ldm.adapters.layers import split
from ldm.adapters.low_rank import LowRank, as_plain
from ldm.adapters.sites import Site
from ldm.checkpoint import weights
from ldm.checkpoint.files import write_text
from ldm.checkpoint.lora_families import kohya_names, names_of
from ldm.checkpoint.lora_files import FIT_RANK
from ldm.checkpoint.lora_names import plain
from ldm.checkpoint.lora_settings import BESIDE, PEFT_FILES
from ldm.models.networks import AnyNetwork
from ldm.models.unet import UNetConfig

log = logging.getLogger(__name__)
_ALGOS: dict[type[Correction], str] = {Hadamard: "loha", Kronecker: "lokr", Rotation: "diag-oft", LowRank: "locon"}


def write_lycoris(
    path: Path,
    corrections: Corrections,
    config: AnyNetwork,
    *,
    dtype: torch.dtype = torch.float32,
    sites: Mapping[str, Site] | None = None,
    rank: int = FIT_RANK,
) -> None:
    """Write LyCORIS' file; a U-Net's layers have kohya's names there, a transformer's diffusers' behind `lycoris_`.

    What has no form there (rows of a product, turned inputs) is written as plain products of at most `rank`, which
    needs the base's `sites`; norms and biases are left out. Both are said. Raises ValueError where nothing is left.
    """
    kept = {n: c for n, c in corrections.items() if len(c.shape) > 1}
    if left := sorted(set(corrections) - set(kept)):
        log.warning("%s: left out %s, which this form does not hold", path, weights.listed(left, 6))
    if not kept:
        raise ValueError(f"{path}: nothing to write of {len(corrections)} layers")
    odd = {n: c for n, c in kept.items() if not _holds(c)}
    if odd:
        if sites is None:
            raise ValueError(f"{path}: needs the base's weights for {next(iter(odd))} and others")
        fitted, errors = as_plain(odd, sites, rank)
        off, size = (sum(e[i] ** 2 for e in errors.values()) ** 0.5 for i in (0, 1))
        log.warning(
            "%s: %d layers are written as plain products of rank %d at most; relative error of the change %.2g",
            path, len(odd), rank, off / size if size else 0.0,
        )  # fmt: skip
        kept |= fitted
    names = _names(kept, config)
    tensors = {f"{names[n]}.{k}": v for n, c in kept.items() for k, v in tensors_of(c).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {k: v.detach().to("cpu", dtype).contiguous() for k, v in tensors.items()}
    save_file(held, path, metadata=_notes(kept, config))


def tensors_of(correction: Correction) -> dict[str, Tensor]:
    """A correction's tensors under LyCORIS' names. Raises ValueError for one that has no form there."""
    if isinstance(correction, LowRank):
        alpha = torch.tensor(float(correction.alpha))
        found = {"lora_down.weight": correction.down, "lora_up.weight": correction.up, "alpha": alpha}
    elif isinstance(correction, Hadamard):
        sides = (correction.a1, correction.b1, correction.a2, correction.b2)
        keys = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        found = {k: v.flatten(1) for k, v in zip(keys, sides, strict=True)}
        found["alpha"] = torch.tensor(float(correction.scale * len(correction.b2)))
    elif isinstance(correction, Kronecker):
        low, high = correction.low, correction.high
        if low is None or high is None:  # readers leave alpha out of two whole factors
            w1, alpha, second = correction.w1 * correction.scale, 1.0, {"lokr_w2": correction.w2}
        else:
            w1, alpha = correction.w1, float(correction.scale * len(high))
            second = {"lokr_w2_a": low, "lokr_w2_b": high.flatten(1)}
        found = {"lokr_w1": w1, **second, "alpha": torch.tensor(alpha)}
    elif isinstance(correction, Rotation) and _holds(correction):
        found = {"oft_blocks": correction.skew / 2, "alpha": torch.tensor(0.0)}  # it is within the bound already
        if correction.rescale is not None:
            found["rescale"] = correction.rescale.view(-1, *[1] * (len(correction.form) - 1))
    else:
        raise ValueError(f"{type(correction).__name__} has no form in LyCORIS' files")
    if correction.magnitude is not None:
        shape = [1] * len(correction.shape)
        shape[correction.axis] = -1
        found["dora_scale"] = correction.magnitude.view(shape)
    return found


def _holds(correction: Correction) -> bool:
    if isinstance(correction, Rotation):
        return not correction.inputs and not correction.terms
    return isinstance(correction, LowRank | Hadamard | Kronecker)


def _names(corrections: Corrections, config: AnyNetwork) -> dict[str, str]:
    """Layer -> its name in the file. Layers that kohya's tables lack have diffusers' names."""
    found = kohya_names(corrections, config) if isinstance(config, UNetConfig) else {}
    for site in corrections:
        component, _, name = site.partition(".")
        if component == "transformer":
            found[site] = f"lycoris_{plain(name)}"
        elif site not in found and component == "unet":
            found[site] = f"lora_unet_{plain(name)}"
    words = [site for site in corrections if site not in found]
    return found | kohya_names(words, config)


def _notes(corrections: Corrections, config: AnyNetwork) -> dict[str, str]:
    algos = sorted({_ALGOS[type(c)] for c in corrections.values()})
    ranks = {len(c.b2) if isinstance(c, Hadamard) else c.rank for c in corrections.values()
             if isinstance(c, Hadamard | LowRank)}  # fmt: skip
    header = names_of(config).header
    return {
        "format": "pt",
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
        "ss_network_args": json.dumps({"algo": algos[0] if len(algos) == 1 else "mixed"}),
        **({} if header is None else {k: v for k, v in header(config).items() if k != "ss_network_module"}),
    }


def peft_holds(corrections: Corrections) -> bool:
    """Whether PEFT's folders hold these: each component's of one kind, LoHa, LoKr or turned inputs, no magnitudes."""
    kinds: dict[str, set[type[Correction]]] = {}
    for site, c in corrections.items():
        turned = isinstance(c, Rotation) and c.inputs and c.rescale is None
        if c.magnitude is not None or not (turned or isinstance(c, Hadamard | Kronecker)):
            return False
        kinds.setdefault(site.partition(".")[0], set()).add(type(c))
    return bool(kinds) and all(len(found) == 1 for found in kinds.values())


def write_peft(folder: Path, corrections: Corrections, *, dtype: torch.dtype = torch.float32) -> None:
    """Write FOLDER/COMPONENT/adapter_model.safetensors and adapter_config.json, as PEFT's `save_pretrained` does.

    Raises ValueError for what PEFT has no such form of.
    """
    if not peft_holds(corrections):
        raise ValueError(
            f"{folder}: PEFT's folders hold LoHa, LoKr or turned inputs, one kind each, without magnitudes"
        )
    components: dict[str, dict[str, Correction]] = {}
    for site, c in corrections.items():
        component, _, name = site.partition(".")
        components.setdefault(component, {})[name] = c
    for component, own in components.items():
        tensors, settings = _peft(own)
        place = folder / component
        place.mkdir(parents=True, exist_ok=True)
        held = {f"base_model.model.{k}": v.detach().to("cpu", dtype).contiguous() for k, v in tensors.items()}
        save_file(held, place / PEFT_FILES[0], metadata={"format": "pt"})
        write_text(place / BESIDE, json.dumps(settings, indent=2))


def _peft(corrections: Corrections) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One component's tensors and settings."""
    tensors: dict[str, Tensor] = {}
    scales: dict[str, tuple[int, float]] = {}
    kind: str = ""
    told: dict[str, Any] = {}
    for name, c in corrections.items():
        if isinstance(c, Hadamard):
            kind, scales[name] = "LOHA", (len(c.b2), c.scale)
            told = {"use_effective_conv2d": False}
        elif isinstance(c, Kronecker):
            whole = max(c.w2.shape[:2])  # of which PEFT takes a factor as whole
            kind, scales[name] = "LOKR", (whole if c.high is None else len(c.high), c.scale)
        if isinstance(c, Rotation):
            kind, side = "OFT", c.skew.shape[1]
            rows = torch.triu_indices(side, side, 1)
            skew = c.skew if c.terms else -c.skew
            tensors[f"{name}.oft_R.weight"] = skew[:, rows[0], rows[1]]
            told = {"r": 0, "oft_block_size": side, "use_cayley_neumann": bool(c.terms),
                    "num_cayley_neumann_terms": c.terms or 5, "coft": False, "block_share": False}  # fmt: skip
            continue
        own = tensors_of(c)
        if isinstance(c, Kronecker):
            own["lokr_w1"] = c.w1
        tensors |= {f"{name}.{k}": v for k, v in own.items() if k != "alpha"}
    if kind == "LOKR":
        told = {"decompose_factor": _factor(corrections), "decompose_both": False, "use_effective_conv2d": False}
    if kind == "OFT" and len({c.skew.shape[1] for c in corrections.values() if isinstance(c, Rotation)}) > 1:
        raise ValueError("PEFT's OFT has one size of blocks for all layers")
    if scales:
        first = next(iter(scales.values()))
        told |= {"r": first[0], "alpha": first[0] * first[1]}
        ranks = {n: r for n, (r, _) in scales.items() if r != first[0]}
        alphas = {n: r * s for n, (r, s) in scales.items() if r * s != first[0] * first[1]}
        told |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    return tensors, {"peft_type": kind, "target_modules": list(corrections), "inference_mode": True, **told}


def _factor(corrections: Corrections) -> int:
    """The factor by which PEFT splits all these layers as they are. Raises ValueError for none."""
    sizes = {(c.form[0], c.form[1], *c.w1.shape) for c in corrections.values() if isinstance(c, Kronecker)}
    for factor in (-1, *sorted({n for _, _, *w in sizes for n in w})):
        if all((split(o, factor)[0], split(i, factor)[0]) == (a, b) for o, i, a, b in sizes):
            return factor
    raise ValueError("PEFT splits all layers by one factor, these are split by several")
