"""Text conditioning by open_clip's towers; imported lazily.

Legend: B batch, T tokens of the context, D width of the hidden states, P width of the pooled vector.
"""

from __future__ import annotations

import gzip
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ldm.types import Cond

if TYPE_CHECKING:
    from open_clip import CLIP

Output = Literal["last", "penultimate_norm", "penultimate"]
Pad = Literal["eot", "zero"]
EMOJI_BPE = Path(__file__).resolve().parents[1] / "assets" / "clip_emoji" / "bpe.txt.gz"


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


@dataclass(frozen=True)
class Overlong:
    """A prompt that does not fit: its index, its length in tokens without the two markers, and what is cut off."""

    index: int
    tokens: int
    limit: int
    cut: str


class Tokenizer:
    """open_clip's byte-pair tokenizer on a merges file; cuts after `context` - 1 tokens and ends with the end token."""

    def __init__(
        self, bpe: str = "standard", *, context: int = 77, pad: Pad = "eot", added: Sequence[Added] = ()
    ) -> None:
        self.bpe, self.context, self.pad = bpe, context, pad
        self._simple = _simple_tokenizer(bpe)
        self.start, self.end = self._simple.sot_token_id, self._simple.eot_token_id
        self.vocab_size: int = self._simple.vocab_size
        self.added: dict[str, list[int]] = {}
        self._any_case: dict[str, list[int]] = {}
        self._words: set[str] = set()
        """Those that `add` added: a folder's own are found inside words too, as transformers does."""
        for token in added:
            ids = _numbered(token, added)
            self.added[token.text] = ids
            if token.any_case:
                self._any_case[_folded(token.text)] = ids

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, T) int64."""
        if isinstance(texts, str):
            raise ValueError("expected a list of prompts, got one string")
        rows = torch.full((len(texts), self.context), self.end if self.pad == "eot" else 0, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = self.encode(text)[: self.context - 2]
            row[: len(ids) + 2] = torch.tensor([self.start, *ids, self.end])
        return rows

    def too_long(self, texts: Sequence[str]) -> list[Overlong]:
        """The prompts of which `__call__` leaves out the end."""
        limit = self.context - 2
        ids = [self.encode(text) for text in texts]
        return [Overlong(i, len(x), limit, self.decode(x[limit:])) for i, x in enumerate(ids) if len(x) > limit]

    def encode(self, text: str) -> list[int]:
        """Ids of one text without markers, of any length; an added token stands for all its ids."""
        if not self.added:
            return self._simple.encode(text)
        parts = re.split("(" + "|".join(map(self._pattern, sorted(self.added, key=len, reverse=True))) + ")", text)
        return [i for part in parts for i in self._own(part) or self._simple.encode(part)]

    def _pattern(self, token: str) -> str:
        if token in self._words:
            return _whole(token)
        if _folded(token) not in self._any_case:
            return re.escape(token)
        return "(?i:" + r"\s+".join(map(re.escape, token.split())) + ")"

    def _own(self, part: str) -> list[int] | None:
        """The ids of an added token."""
        return self.added.get(part) or self._any_case.get(_folded(part))

    def add(self, token: str, ids: Sequence[int]) -> None:
        """Let a token stand for ids. Raises ValueError when the vocabulary or an earlier addition has it."""
        if not token or token != " ".join(token.split()):
            raise ValueError(f"token {token!r}: expected words with one space between them, such as <thing>")
        if self._own(token):
            raise ValueError(f"token {token!r}: exists already; choose another name")
        if len(known := self._simple.encode(token)) < 2:
            raise ValueError(
                f"token {token!r}: the vocabulary has it already ({known}); choose another, such as <thing>"
            )
        self.added[token] = list(ids)
        self._words.add(token)

    def free(self, token: str) -> bool:
        """Whether `add` would take it."""
        return bool(token) and not self._own(token) and len(self._simple.encode(token)) > 1

    def alias(self, token: str, of: str) -> None:
        """Let another name stand for what an added token stands for."""
        self.add(token, self.added[of])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without markers; of an added token's ids the first one is its name."""
        names = {own[0]: token for token, own in reversed(self.added.items())}
        parts: list[str] = []
        run: list[int] = []
        for i in [*ids, -1]:
            if 0 <= i < self.vocab_size:
                run.append(i)
                continue
            parts += [self._simple.decode(run).strip()] if run else []
            parts += [names[i]] if i in names else []
            run = []
        return " ".join(parts)

    def vocabulary(self) -> dict[str, int]:
        """Token -> id with the marker names of Hugging Face's CLIP tokenizer (`vocab.json`)."""
        ids = dict(self._simple.encoder)
        del ids["<start_of_text>"], ids["<end_of_text>"]
        return {**ids, "<|startoftext|>": self.start, "<|endoftext|>": self.end}

    def merges(self) -> list[tuple[str, str]]:
        """The merges in order of rank (`merges.txt`)."""
        return sorted(self._simple.bpe_ranks, key=self._simple.bpe_ranks.__getitem__)


def _folded(token: str) -> str:
    return " ".join(token.lower().split())


def _numbered(token: Added, added: Sequence[Added]) -> list[int]:
    """The ids that a token stands for: its own, and those of <token>_1, <token>_2 ... (diffusers' several vectors)."""
    ids, by_text = [token.id], {a.text: a.id for a in added}
    while (further := by_text.get(f"{token.text}_{len(ids)}")) is not None:
        ids.append(further)
    return ids


def _whole(token: str) -> str:
    """A pattern for a token that is not a part of a longer word."""
    start, end = (r"\b" if c.isalnum() else "" for c in (token[0], token[-1]))
    return start + re.escape(token) + end


@lru_cache(maxsize=8)
def _simple_tokenizer(bpe: str) -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    if bpe == "standard":
        return SimpleTokenizer()
    path = EMOJI_BPE if bpe == "emoji" else Path(bpe)
    if not path.is_file():
        raise ValueError(f"bpe {bpe!r}: expected 'standard', 'emoji' or a file of merges; no such file")
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    lines = [line for line in text.split("\n") if line.strip()]
    if bad := [line for line in lines[1:] if len(line.split()) != 2]:
        raise ValueError(f"bpe {bpe!r}: expected a header line, then two tokens a line; got {bad[0]!r}")
    with tempfile.NamedTemporaryFile(suffix=".txt.gz") as file:  # open_clip reads a path, and counts an empty last line
        file.write(gzip.compress("\n".join(lines).encode("utf-8")))
        file.flush()
        return SimpleTokenizer(bpe_path=file.name)


def build_tokenizer(config: TextConfig | ClipConfig) -> Tokenizer:
    """The tokenizer that belongs to a tower; raises ValueError if its vocabulary has another size."""
    if isinstance(config, TextConfig):
        context = config.max_length or config.context_length
        tokenizer = Tokenizer(config.bpe, context=context, pad=config.pad, added=config.added)
    else:
        tokenizer = Tokenizer(config.bpe, context=config.context_length, pad=config.pad)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"vocab_size {config.vocab_size}: bpe {config.bpe!r} has {tokenizer.vocab_size} tokens")
    return tokenizer


def build_clip(config: ClipConfig) -> CLIP:
    """An open_clip model with random weights; `encode_image` takes (B, 3, S, S), `encode_text` tokens (B, T)."""
    from open_clip import CLIP

    both = open_clip_config(config)
    # a temperature of shape (1,): DeepSpeed cannot broadcast parameters without a dimension
    quick = config.quick_gelu
    return CLIP(both["embed_dim"], both["vision_cfg"], both["text_cfg"], quick_gelu=quick, nonscalar_logit_scale=True)


def open_clip_config(config: ClipConfig) -> dict[str, Any]:
    """The same model as an open_clip model config (its JSON)."""
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.quick_gelu,
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.vision_width,
            "layers": config.vision_layers,
            "head_width": config.vision_head_width,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": config.vocab_size,
            "width": config.text_width,
            "heads": config.text_heads,
            "layers": config.text_layers,
        },
    }


class TextTower(nn.Module):
    """A frozen text tower: prompts -> tokens -> hidden states and pooled vector, in the weights' own precision."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        from open_clip.transformer import QuickGELU, TextTransformer

        self.config = config
        self.model = TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            mlp_ratio=(config.mlp_width or 4 * config.width) / config.width,
            output_dim=config.projection,
            act_layer=QuickGELU if config.activation == "quick_gelu" else nn.GELU,
        )
        self.tokenizer = build_tokenizer(config)
        self._new: list[Callable[[], Tensor]] = []
        self._first = config.vocab_size
        self.requires_grad_(False).eval()

    def add_token(self, token: str, count: int, rows: Callable[[], Tensor]) -> None:
        """Let a token stand for `count` new vectors, which `rows` gives as (count, D) at every use.

        Raises ValueError when the token exists.
        """
        self.tokenizer.add(token, range(self._first, self._first + count))
        self._first += count
        self._new.append(rows)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings (B, T, D); ids past the vocabulary are the added vectors."""
        table = self.model.token_embedding
        if not self._new:
            return table(tokens)
        size = table.num_embeddings
        rows = torch.cat([rows() for rows in self._new])
        known = table(tokens.clamp(max=size - 1))
        return torch.where((tokens >= size)[..., None], rows[(tokens - size).clamp(min=0)].to(known), known)

    @staticmethod
    def of_clip(model: CLIP, config: TextConfig) -> TextTower:
        """A copy of the text tower of an open_clip model."""
        tower = TextTower(config)
        names = set(tower.model.state_dict())
        tower.model.load_state_dict({k: v for k, v in model.state_dict().items() if k in names}, strict=True)
        return tower

    @property
    def width(self) -> int:
        """D."""
        return self.config.width

    @property
    def context(self) -> int:
        """T."""
        return self.tokenizer.context

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, T) int64; longer prompts are cut as CLIP does, `tokenizer.too_long` tells which."""
        return self.tokenizer(texts)

    def encode(self, tokens: Tensor) -> Cond:
        """{"text": (B, T, D), "pooled": (B, P)} of token ids (B, T); never under autocast."""
        model, rule = self.model, self.config.output
        tokens = tokens.to(model.positional_embedding.device)
        with nullcontext() if tokens.is_meta else torch.autocast(tokens.device.type, enabled=False):
            x = self._embed(tokens) + model.positional_embedding[: tokens.shape[1]]
            mask = model.attn_mask
            assert mask is not None
            mask = mask[: tokens.shape[1], : tokens.shape[1]]
            before = x
            for block in model.transformer.resblocks:
                before, x = x, block(x, attn_mask=mask)
            last = model.ln_final(x)
            end = last[torch.arange(len(tokens), device=tokens.device), self._pooled_at(tokens)]
            pooled = end if model.text_projection is None else end @ model.text_projection
            if rule == "last":
                return {"text": last, "pooled": pooled}
            return {"text": model.ln_final(before) if rule == "penultimate_norm" else before, "pooled": pooled}

    def _pooled_at(self, tokens: Tensor) -> Tensor:
        """Where the pooled vector is taken, (B,)."""
        if self.config.pooled_at == "largest":  # new vectors beyond the table have no part in it
            return tokens.masked_fill(tokens >= self.config.vocab_size, -1).argmax(1)
        return (tokens == self.tokenizer.end).int().argmax(1)

    def forward(self, texts: Sequence[str]) -> Cond:
        """`encode(tokenize(texts))`, with zeros for empty prompts where the family says so."""
        cond = self.encode(self.tokenize(texts))
        if self.config.zero_empty:
            keep = torch.tensor([t != "" for t in texts], device=cond["text"].device)
            cond = {k: v * keep.view(-1, *[1] * (v.ndim - 1)) for k, v in cond.items()}
        return cond

    @property
    def empty(self) -> Cond:
        """The unconditional input with B = 1: what dropped captions become in training, and guidance's other half."""
        with torch.no_grad():
            return self([""])


def encode_texts(towers: Sequence[TextTower], texts: Sequence[str]) -> Cond:
    """Hidden states of all towers side by side (B, T, sum of D) and the last one's pooled vector."""
    conds = [tower(texts) for tower in towers]
    return {"text": torch.cat([c["text"] for c in conds], dim=-1), "pooled": conds[-1]["pooled"]}
