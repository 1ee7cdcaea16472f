"""Pickled weights without running code: torch's restricted reader, and nothing in place of a trainer's objects."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

_TRAINERS = re.compile(r"(pytorch_lightning|lightning|lightning_fabric|omegaconf)\.|torch\.nn\.modules\.container\.")
_NESTS = ("state_dict", "model_state_dict", "module", "model", "params", "weights", "string_to_param")


class Inert:
    """Stands for an object of a trainer, such as Lightning's callbacks: keeps what it is given and does nothing."""

    def __new__(cls, *args: Any, **more: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **more: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_pickled(path: Path) -> Any:
    """What the file holds. Raises ValueError naming the file when it is damaged or would run code."""
    zipped = zipfile.is_zipfile(path)
    try:
        names = get_unsafe_globals_in_checkpoint(str(path)) if zipped else []
        inert: list[Any] = [(Inert, name) for name in names if _TRAINERS.match(name)]
        with safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        text = str(error)
        found = re.search(r"GLOBAL (\S+)", text)
        if found or "weights_only" in text or "nsupported" in text:
            what = f"it would run {found[1]}" if found else "it holds more than tensors"
            raise ValueError(f"{path}: refused: {what} on loading; give it as safetensors") from error
        raise ValueError(f"{path}: not readable as weights: {text.splitlines()[0] if text else error!r}") from error


def named_tensors(data: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name, from within "state_dict" and the like. Raises ValueError where there are none."""
    while isinstance(data, dict) and not any(isinstance(v, Tensor) for v in data.values()):
        inner = [data[k] for k in _NESTS if isinstance(data.get(k), dict)]
        if not inner:
            break
        data = inner[0]
    while isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    found = {str(k): v for k, v in data.items() if isinstance(v, Tensor)} if isinstance(data, dict) else {}
    if not found:
        held = f"a {type(data).__name__}" if not isinstance(data, dict) else f"the keys {[str(k) for k in data][:5]}"
        raise ValueError(f"{path}: expected named tensors, got {held}")
    return found
