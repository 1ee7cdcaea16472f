"""A second term that keeps what the model was: its own answer to other words, without the adapter, is the target.

As ai-toolkit has it: the class's word in the place of the trigger, or no words at all, at the same noise and times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ldm.objectives.around import AroundDenoise
from ldm.objectives.denoise import DenoiseObjective
from ldm.objectives.inputs import EncodeText
from ldm.rng import Rng
from ldm.types import Batch, Cond, Metrics

NAME = "loss_preserved"


@dataclass(frozen=True, kw_only=True)
class Preserve:
    """`weight` times the squared difference of the network's answers with and without its adapter is added.

    `kind` "class": to captions with `word` in the place of `trigger` (None: the data's, of DreamBooth the identifier
    and the noun); "blank": to no words.
    """

    kind: Literal["class", "blank"] = "class"
    word: str | None = None
    trigger: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight must be above 0, got {self.weight}")
        if self.kind == "blank" and (self.word is not None or self.trigger is not None):
            raise ValueError("word and trigger are of kind class; leave them out")


class PreservingObjective(AroundDenoise):
    """A denoising loss, and beside it how far the adapter moves the answers to other words."""

    def __init__(
        self,
        denoise: DenoiseObjective,
        preserve: Preserve,
        without: Callable[[], AbstractContextManager[None]],
        encode_text: EncodeText,
    ) -> None:
        """`without`: inside it the network has no adapter. Raises ValueError for options of the loss that clash."""
        super().__init__(denoise)
        options = denoise.options
        odd = {"repeats": options.repeats > 1, "small": options.small, "route": options.route, "concat": options.concat}
        if names := [name for name, on in odd.items() if on]:
            raise ValueError(f"task.preserve: with task.options.{names[0]}: not known together; leave one of both out")
        self._preserve, self._without, self._encode_text = preserve, without, encode_text
        self._known: dict[str, Cond] = {}

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        loss, metrics = self.denoise(batch, rng)
        if not torch.is_grad_enabled():
            return loss, metrics
        noised, t = self.denoise.noised(batch, rng)
        cond = self.denoise.cond(batch, rng) | self._words(batch["caption"])
        with torch.no_grad(), self._without():
            before = self.trained(noised, t, cond)
        error = (self.trained(noised, t, cond) - before).float().square().flatten(1).mean(1)
        term = (error * batch["weight"].to(error)).mean()
        return loss + self._preserve.weight * term, metrics | {NAME: term.detach()}

    def _words(self, captions: Sequence[str]) -> Cond:
        """The text states of the captions' other words, each encoded once."""
        texts = [self.other(caption) for caption in captions]
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            with torch.no_grad():
                made = self._encode_text(new)
            self._known |= {text: {k: v[i : i + 1].cpu() for k, v in made.items()} for i, text in enumerate(new)}
        rows = [self._known[text] for text in texts]
        device = self.device
        whole = {k: torch.cat([row[k] for row in rows]).to(device) for k in rows[0]}
        return {k: v.float() if v.is_floating_point() else v for k, v in whole.items()}

    def other(self, caption: str) -> str:
        """What is said instead of a caption."""
        if self._preserve.kind == "blank":
            return ""
        assert self._preserve.trigger is not None
        return caption.replace(self._preserve.trigger, self._preserve.word or "").strip()
