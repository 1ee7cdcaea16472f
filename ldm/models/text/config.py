"""What a CLIP text tower is, and which of its states conditions a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Output = Literal["last", "penultimate_norm", "penultimate"]
Pad = Literal["eot", "zero"]


@dataclass(frozen=True, kw_only=True)
class Added:
    """A token that a model's own tokenizer has beyond its merges; its row is in the tower's table.

    `any_case`: it is found whatever the case of its letters, as transformers' tokens are that are not special.
    """

    text: str
    id: int
    any_case: bool = True


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A CLIP text tower and which of its states conditions the U-Net.

    `output`: "last" is the last layer after the final norm (SD 1.x, ours), "penultimate_norm" the layer before it after
    the final norm (SD 2.x), "penultimate" that layer without the norm (SDXL). `pad` is what follows the end token.
    `bpe`: "standard" (49,408 tokens), "emoji" (4,096, shipped) or a path to a merges file, plain or gzip.
    `zero_empty`: the unconditional input is zeros instead of the encoded empty prompt (SDXL). `max_length`: prompts are
    cut at, and padded to, fewer tokens than `context_length`. `added`: tokens of the model's own tokenizer.
    `pooled_at`: the pooled vector is that of the first end token, or of the largest id of the table (transformers' rule
    for old files, another one where added tokens have larger ids than the end token).
    """

    width: int = 768
    heads: int = 12
    layers: int = 12
    mlp_width: int | None = None
    context_length: int = 77
    vocab_size: int = 49408
    activation: Literal["gelu", "quick_gelu"] = "quick_gelu"
    projection: int | None = None
    output: Output = "last"
    pad: Pad = "eot"
    bpe: str = "standard"
    zero_empty: bool = False
    max_length: int | None = None
    added: tuple[Added, ...] = ()
    pooled_at: Literal["end", "largest"] = "end"

    def __post_init__(self) -> None:
        if self.activation not in (known := ("gelu", "quick_gelu")):
            raise ValueError(f"activation {self.activation!r} is not one of {list(known)}")
        if self.max_length is not None and not 3 <= self.max_length <= self.context_length:
            raise ValueError(f"max_length must lie in [3, {self.context_length}], got {self.max_length}")
        if high := [a.text for a in self.added if a.id >= self.vocab_size]:
            raise ValueError(f"added token {high[0]!r}: its id is beyond the table of {self.vocab_size} rows")
        _check_tower("", self.width, self.heads, self.layers, self.context_length)
        if self.output != "last" and self.layers < 2:
            raise ValueError(f"output {self.output!r} needs at least 2 layers, got {self.layers}")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Both towers of a small open_clip model; the vision tower is a ViT on square images in [-1, 1]."""

    embed_dim: int = 192
    context_length: int = 32
    vocab_size: int = 4096
    text_width: int = 192
    text_heads: int = 3
    text_layers: int = 4
    image_size: int = 64
    patch_size: int = 8
    vision_width: int = 192
    vision_layers: int = 4
    vision_head_width: int = 64
    quick_gelu: bool = False
    bpe: str = "emoji"
    pad: Pad = "eot"

    def __post_init__(self) -> None:
        _check_tower("text_", self.text_width, self.text_heads, self.text_layers, self.context_length)
        if self.vision_width % self.vision_head_width:
            raise ValueError(
                f"vision_width {self.vision_width} must be a multiple of vision_head_width {self.vision_head_width}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")

    @property
    def text(self) -> TextConfig:
        """The text tower alone, as it conditions a U-Net."""
        return TextConfig(
            width=self.text_width,
            heads=self.text_heads,
            layers=self.text_layers,
            context_length=self.context_length,
            vocab_size=self.vocab_size,
            activation="quick_gelu" if self.quick_gelu else "gelu",
            projection=self.embed_dim,
            pad=self.pad,
            bpe=self.bpe,
        )


def _check_tower(prefix: str, width: int, heads: int, layers: int, context: int) -> None:
    if heads < 1 or width % heads:
        raise ValueError(f"{prefix}width {width} must be a multiple of {prefix}heads {heads}")
    if layers < 1:
        raise ValueError(f"{prefix}layers must be at least 1, got {layers}")
    if context < 3:
        raise ValueError(f"context_length must be at least 3, got {context}")
