"""The settings of a distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ldm.adapters.lora import LoraConfig
from ldm.models.network import Granularity
from ldm.models.text import T5Padding, TextPrecision
from ldm.objectives.consistency import ConsistencyOptions
from ldm.objectives.matching import MatchingOptions
from ldm.objectives.progressive import ProgressiveOptions
from ldm.objectives.trajectory import TrajectoryOptions
from ldm.recipes.text_to_image import Samples

Method = ConsistencyOptions | ProgressiveOptions | TrajectoryOptions | MatchingOptions


@dataclass(frozen=True, kw_only=True)
class DistillTask:
    """`teacher` is a shipped model, a run, a diffusers folder or a single file; the student starts as its network.

    `guidance_embedding` is the width of the student's embedding of w, or null for a student of no (or one) guidance.
    With `lora` the teacher's own weights stay and corrections train on them: one copy serves teacher and student; they
    start as none, or as those of `start`: a shipped student, a run or a folder with a LoRA of these layers and rank.
    `prediction` "v" needs the method progressive with stage "match" where the teacher has another. `drop`: share of
    captions that become the empty prompt. `cache`, `text_precision` and `t5_padding` as in text_to_image.
    """

    kind: Literal["distill"] = "distill"
    teacher: str
    text_precision: TextPrecision = "fp32"
    t5_padding: T5Padding = "unmodified"
    method: Method
    """The method of distillation, and its options."""
    guidance_embedding: int | None = 256
    lora: LoraConfig | None = None
    start: str | None = None
    prediction: Literal["teacher", "v", "sample"] = "teacher"
    drop: float = 0.0
    cache: Path | None = None
    gradient_checkpointing: bool | Granularity = False
    """Whether activations are computed again in the backward pass, for less memory."""
    samples: Samples = field(default_factory=Samples)

    def __post_init__(self) -> None:
        method = self.method
        if self.guidance_embedding is not None and self.guidance_embedding < 4:
            raise ValueError(f"guidance_embedding must be null or at least 4, got {self.guidance_embedding}")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop must be in [0, 1], got {self.drop}")
        if self.lora is not None:
            if isinstance(method, ProgressiveOptions):
                raise ValueError(f"lora: method {method.kind!r} trains whole networks; lcm, tcd and dmd take lora")
            if self.guidance_embedding is not None:
                raise ValueError("guidance_embedding: a LoRA has none, write null; its guidance is the one in `w`")
            if self.lora.text:
                raise ValueError("lora.text: the text towers are not distilled, write false")
        elif self.start is not None:
            raise ValueError(f"start: {self.start!r} is a LoRA to go on with, and needs lora")
        matches = isinstance(method, ProgressiveOptions) and method.stage == "match"
        if self.prediction != "teacher" and not matches:
            raise ValueError(f"prediction: {self.prediction!r} needs method progressive with stage match")
