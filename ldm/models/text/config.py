"""What a text encoder is, and which of its states condition a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Output = Literal["last", "penultimate_norm", "penultimate"]
Pad = Literal["eot", "zero"]
T5Padding = Literal["unmodified", "zero"]


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

    kind: Literal["clip"] = "clip"
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
class T5Config:
    """The encoder of a T5 (arXiv 1910.10683; v1.1 with gated GELU), under the names of transformers' `config.json`.

    The defaults are t5-v1_1-xxl (SD3, FLUX.1, PixArt). `max_length`: prompts are cut at, and padded to, so many tokens
    with the end token (SD3 256, FLUX.1 512, PixArt-Sigma 300). `masked`: padding is hidden from the encoder, and from
    the network by "mask" (PixArt); without it both see the padding (SD3, FLUX.1), unless `padding` is "zero": then it
    is hidden from the encoder, and its states are zeros for the network. `lower`: prompts in small letters (PixArt,
    whose cleaning of captions is `ldm.models.text.captions`). `tokenizer`: a folder with `tokenizer.json` or
    `spiece.model`.
    """

    kind: Literal["t5"] = "t5"
    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: Literal["gated-gelu", "relu"] = "gated-gelu"
    max_length: int = 256
    masked: bool = False
    padding: T5Padding = "unmodified"
    lower: bool = False
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        if self.feed_forward_proj not in (known := ("gated-gelu", "relu")):
            raise ValueError(f"feed_forward_proj {self.feed_forward_proj!r} is not one of {list(known)}")
        sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        _at_least(1, self, *sizes)
        _at_least(2, self, "max_length")
        buckets, far = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 2 or far <= buckets // 4:
            raise ValueError(
                f"relative_attention_num_buckets {buckets} must be an even number of at least 4, and "
                f"relative_attention_max_distance {far} larger than a quarter of it"
            )
        _positive("layer_norm_epsilon", self.layer_norm_epsilon)

    @property
    def width(self) -> int:
        """D of its states."""
        return self.d_model


@dataclass(frozen=True, kw_only=True)
class QwenConfig:
    """A Qwen3 language model (arXiv 2505.09388), under the names of transformers' `config.json`.

    The defaults are Qwen3-4B as Z-Image uses it. `layers`: the states of which layers, side by side on the channels; 0
    is the embeddings, -2 what goes into the last layer (Z-Image; FLUX.2 klein takes 9, 18, 27). `thinking`: whether the
    tokenizer's chat template leaves room for thoughts (Z-Image) or closes it (FLUX.2 klein). `masked`: the padding,
    which the model never sees, is hidden from the network too, by "mask". `max_length`: prompts are cut at, and padded
    to, so many tokens with those of the template. `tokenizer`: a folder with `tokenizer.json`, or `vocab.json` and
    `merges.txt`, and the chat template.
    """

    kind: Literal["qwen"] = "qwen"
    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 40960
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    attention_bias: bool = False
    layers: tuple[int, ...] = (-2,)
    thinking: bool = True
    masked: bool = True
    max_length: int = 512
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
        _at_least(1, self, *sizes, "num_key_value_heads")
        if self.num_attention_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")
        _at_least(16, self, "max_length")
        if self.max_length > self.max_position_embeddings:
            raise ValueError(
                f"max_length must be at most max_position_embeddings {self.max_position_embeddings}, "
                f"got {self.max_length}"
            )
        _positive("rms_norm_eps", self.rms_norm_eps)
        _positive("rope_theta", self.rope_theta)
        known = self.num_hidden_layers + 1
        if not self.layers or any(not -known <= layer < known for layer in self.layers):
            raise ValueError(f"layers {list(self.layers)} must name some in [{-known}, {known})")

    @property
    def width(self) -> int:
        """D of its states."""
        return self.hidden_size * len(self.layers)


@dataclass(frozen=True, kw_only=True)
class MissingConfig:
    """A text encoder that is left out: zeros (B, `tokens`, `width`) stand in its place (SD3 without T5)."""

    kind: Literal["none"] = "none"
    width: int = 4096
    tokens: int = 256

    def __post_init__(self) -> None:
        _at_least(1, self, "width", "tokens")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Both towers of a small open_clip model; the vision tower is a ViT on square images in [-1, 1]."""

    embed_dim: int = 192
    """Width of the embeddings that are compared."""
    context_length: int = 32
    """Tokens of a caption."""
    vocab_size: int = 4096
    """Number of tokens that there are."""
    text_width: int = 192
    """Width of the text tower."""
    text_heads: int = 3
    """Heads of the text tower."""
    text_layers: int = 4
    """Layers of the text tower."""
    image_size: int = 64
    """Side of its pictures in pixels, a multiple of `patch_size`."""
    patch_size: int = 8
    """Pixels along a side of a token of the vision tower."""
    vision_width: int = 192
    """Width of the vision tower, a multiple of `vision_head_width`."""
    vision_layers: int = 4
    """Layers of the vision tower."""
    vision_head_width: int = 64
    """Channels of a head of the vision tower."""
    quick_gelu: bool = False
    """Whether the text tower uses quick GELU instead of GELU."""
    bpe: str = "emoji"
    """The vocabulary of byte pairs."""
    pad: Pad = "eot"
    """What follows a caption: the end token again, or zeros."""

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


def _at_least(least: int, config: object, *keys: str) -> None:
    for key in keys:
        if getattr(config, key) < least:
            raise ValueError(f"{key} must be at least {least}, got {getattr(config, key)}")


def _positive(key: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{key} must be above 0, got {value}")


AnyText = TextConfig | T5Config | QwenConfig | MissingConfig
"""The choice of a text encoder in a config, told apart by `kind`."""
