"""Rates by part: text encoders, a LoRA's second matrix, blocks of the network, each as a share of the run's rate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_TEXT = re.compile(r"text(?:_encoder)?(?:_?(\d+))?\.(?:(\d+)\.)?")
_OWN = ("trained.", "lora.", "layers.", "words.")
"""What adapters put before the name of the layer that they train."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Other rates than `lr` for parts; all follow its schedule.

    `text`: text encoders', or [..] one for each of them in their order. `lora_plus`: how many times its rate the second
    matrix of a LoRA (`lora_B`, `up`) has (LoRA+, arXiv 2402.12354; about 16). `blocks`: shares by the beginning of a
    layer's name, as diffusers and `ldm show` have it (`down_blocks.0`, `mid_block`, `up_blocks.1.attentions.0`); the
    longest that fits is taken, and a share of 0 freezes what it names.
    """

    text: float | tuple[float, ...] | None = None
    lora_plus: float = 1.0
    blocks: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rate in self.texts:
            if not (math.isfinite(rate) and rate >= 0):
                raise ValueError(f"text must be at least 0, got {self.text}")
        if not (math.isfinite(self.lora_plus) and self.lora_plus > 0):
            raise ValueError(f"lora_plus must be above 0, got {self.lora_plus}")
        for name, share in self.blocks.items():
            if not (math.isfinite(share) and share >= 0):
                raise ValueError(f"blocks.{name} must be at least 0, got {share}")

    @property
    def texts(self) -> tuple[float, ...]:
        """The text encoders' rates, none where they are as all others."""
        if self.text is None:
            return ()
        return self.text if isinstance(self.text, tuple) else (self.text,)

    @property
    def alike(self) -> bool:
        """Whether all parts have one rate."""
        return not self.texts and self.lora_plus == 1 and not self.blocks

    def share(self, name: str, lr: float) -> float:
        """Of `lr` for the parameter of this name. Raises ValueError where a text encoder has no rate."""
        inner = bare(name)
        share = self.lora_plus if inner.endswith(".up") or ".lora_B." in inner else 1.0
        if (number := encoder(inner)) is not None:
            if not self.texts:
                return share
            if len(self.texts) > 1 and number >= len(self.texts):
                raise ValueError(
                    f"train.optim.rates.text: {list(self.texts)}, and there is a text encoder {number + 1}"
                )
            return share * self.texts[number if len(self.texts) > 1 else 0] / lr
        fitting = [key for key in self.blocks if fits(key, inner)]
        return share * (self.blocks[max(fitting, key=len)] if fitting else 1.0)

    def check(self, names: Iterable[str]) -> None:
        """Raise ValueError for what names nothing that trains."""
        inner = [bare(name) for name in names]
        for key in self.blocks:
            if not any(fits(key, name) for name in inner if encoder(name) is None):
                some = sorted({_block(name) for name in inner if encoder(name) is None}, key=_numbered)[:6]
                raise ValueError(
                    f"train.optim.rates.blocks.{key}: no layer that trains begins so; some that do: {', '.join(some)}"
                )
        if self.texts and not any(encoder(name) is not None for name in inner):
            raise ValueError(f"train.optim.rates.text: {self.text}, but no text encoder trains; write null")
        if self.lora_plus != 1 and not any(name.endswith(".up") or ".lora_B." in name for name in inner):
            raise ValueError(f"train.optim.rates.lora_plus: {self.lora_plus}, but no LoRA trains; write 1")


def _block(name: str) -> str:
    """The beginning of a layer's name up to its first number, or its first part."""
    parts = name.split(".")
    return ".".join(parts[: next((i + 1 for i, part in enumerate(parts) if part.isdigit()), 1)])


def _numbered(name: str) -> tuple[bool, str]:
    return not name[-1:].isdigit(), name


def bare(name: str) -> str:
    """The layer's own name of a parameter, without what adapters put before it and with dots."""
    while prefix := next((p for p in _OWN if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name.replace("/", ".")


def encoder(name: str) -> int | None:
    """Which text encoder (from 0) a bare name is of: text.I.NAME, text_encoder_2.NAME; None for others."""
    found = _TEXT.match(name)
    if found is None:
        return None
    if found[2] is not None:
        return int(found[2])
    return 0 if found[1] is None else int(found[1]) - 1


def fits(key: str, name: str) -> bool:
    """Whether a bare name begins with the parts of `key`, with or without the network's component (unet)."""
    parts, own = key.split("."), name.split(".")
    return own[: len(parts)] == parts or own[1 : len(parts) + 1] == parts
