"""The scale of a LoRA where its tensors do not tell it: PEFT's settings in the file's header, or beside the file.

As the libraries do it: an `alpha` tensor counts; else diffusers' `lora_adapter_metadata` of the header; else the
`adapter_config.json` that PEFT writes beside its `adapter_model` file; else alpha is the rank.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
BESIDE = "adapter_config.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_KINDS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha", "OFT": "alpha"}
_CHANGED_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga|mica|kasa", re.IGNORECASE)
_OTHER_RULES = ("fan_in_fan_out", "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens",
                "arrow_config", "kasa_config", "monteclora_config", "trainable_token_indices", "target_parameters",
                "megatron_config", "velora_config")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """PEFT's settings by component; "" holds those of the whole file."""

    by_component: Mapping[str, Mapping[str, Any]]
    where: str

    def of(self, site: str) -> tuple[Mapping[str, Any], str]:
        """The settings of a layer's component, and the layer's name in it."""
        component, _, name = site.partition(".")
        return self.by_component.get(component, self.by_component.get("", {})), name

    def scale(self, site: str, rank: int) -> float:
        """What a product of a rank is multiplied with. Raises ValueError where the file has another rank."""
        settings, name = self.of(site)
        if not settings:
            return 1.0
        told = _pattern(settings.get("rank_pattern"), name, settings.get("r"))
        if told is not None and int(told) != rank and settings.get("peft_type", "LORA") == "LORA":
            raise ValueError(f"{self.where} says that the rank of {site} is {told}, the file has {rank}")
        rank = rank if told is None else int(told)
        key = _KINDS[settings.get("peft_type", "LORA")]
        alpha = _pattern(settings.get("alpha_pattern"), name, settings.get(key))
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def decomposed(self, site: str) -> bool:
        """Whether the layer has magnitudes by these settings."""
        return bool(self.of(site)[0].get("use_dora"))


def settings_of(path: Path, notes: Mapping[str, str], peft_names: bool, told: bool) -> Settings:
    """Those of a file with this header; `told`: its tensors carry alpha, `peft_names`: they have PEFT's names.

    Raises ValueError for settings that are no JSON or change what the tensors mean in a way that is not known here.
    """
    if text := notes.get("lora_adapter_metadata"):
        flat = _json(text, f"{path}: lora_adapter_metadata")
        parts: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            component, dot, name = key.partition(".")
            parts.setdefault(component if dot else "", {})[name if dot else key] = value
        return Settings({k: _checked(v, str(path)) for k, v in parts.items()}, f"{path}: its header")
    beside = path.with_name(BESIDE)
    own = path.name in PEFT_FILES or peft_names
    if not beside.is_file() or not (own or not (told or _has_peft_file(path.parent))):
        return Settings({}, str(path))
    settings = _checked(_json(beside.read_text(encoding="utf-8-sig"), str(beside)), str(beside))
    if not own:
        log.warning("%s: alpha stands in %s beside it alone; it is taken from there", path, BESIDE)
    return Settings({"": settings}, str(beside))


def header_alpha(notes: Mapping[str, str], path: Path) -> None:
    """Warn where kohya's header names an alpha that no tensor has: no reader takes it from there."""
    alpha, rank = notes.get("ss_network_alpha"), notes.get("ss_network_dim")
    if alpha not in (None, "None", "Dynamic") and alpha != rank:
        log.warning(
            "%s: the header says alpha %s of rank %s, but no tensor does; scale 1 is taken, as other readers do",
            path, alpha, rank,
        )  # fmt: skip


def _has_peft_file(folder: Path) -> bool:
    return any((folder / name).is_file() for name in PEFT_FILES)


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected keys and values, got {type(found).__name__}")
    return found


def _checked(settings: dict[str, Any], where: str) -> dict[str, Any]:
    kind = settings.get("peft_type") or "LORA"
    if kind not in _KINDS:
        raise ValueError(f"{where}: peft_type {kind!r} is not one of {sorted(_KINDS)}")
    if odd := [k for k in _OTHER_RULES if settings.get(k)]:
        raise ValueError(f"{where}: {odd[0]} {settings[odd[0]]!r} changes what the tensors mean and is not known here")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and _CHANGED_BASE.match(start):
        raise ValueError(
            f"{where}: init_lora_weights {start!r} changed the base's weights too; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    return {**settings, "peft_type": kind}


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that is the name or its end, as PEFT reads them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
