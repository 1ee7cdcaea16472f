"""Qwen3, a language model whose inner states Z-Image and FLUX.2 klein are told their text by; imported lazily.

Legend: B batch, T tokens of the context, D width of the states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.text.base import own_precision
from ldm.models.text.config import QwenConfig
from ldm.models.text.pretrained import (
    PretrainedEncoder,
    PretrainedTokenizer,
    padding_free,
    tokenizer_folder,
    transformers_for,
)
from ldm.types import Cond

TITLE = "Qwen3 text encoder"
FORMS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Files that a tokenizer's folder has: those of one of these, and others that say more."""
_MARK = "\ue000"


class QwenTokenizer(PretrainedTokenizer):
    """Qwen's byte-pair tokenizer and its chat template: a prompt is what a user says, and the answer begins.

    The template is the tokenizer's own, run by transformers in a sandbox.
    """

    def __init__(self, folder: Path, *, context: int, thinking: bool = True) -> None:
        folder = tokenizer_folder(folder, TITLE, FORMS)
        cls = transformers_for(f"the {TITLE}").Qwen2TokenizerFast
        super().__init__(cls.from_pretrained(str(folder), local_files_only=True), folder, context)
        self.thinking = thinking
        if self._fast.chat_template is None:
            raise ValueError(
                f"tokenizer {str(folder)!r}: no chat template; expected chat_template in tokenizer_config.json, or "
                "chat_template.jinja"
            )
        if self._fast.padding_side != "right":
            raise ValueError(f"tokenizer {str(folder)!r}: padding_side {self._fast.padding_side!r} is not 'right'")
        before, mark, after = self._said(_MARK).partition(_MARK)
        if not mark:
            raise ValueError(f"tokenizer {str(folder)!r}: its chat template leaves out what the user says")
        self._before, self._after = self._plain(before), self._plain(after)

    def _said(self, text: str) -> str:
        messages = [{"role": "user", "content": text}]
        told: Any = self._fast.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=self.thinking
        )
        return told

    @property
    def limit(self) -> int:
        """How many tokens of a prompt's own fit behind the template's first ones; its last ones are cut off first."""
        return self.context - len(self._before)

    def framed(self, ids: Sequence[int]) -> list[int]:
        """A prompt's own ids within the template, cut at the end as a whole."""
        return [*self._before, *ids, *self._after][: self.context]

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """What the encoder takes of each text, without padding."""
        if isinstance(texts, str):
            raise ValueError("expected a list of prompts, got one string")
        return [self.encode(self._said(text))[: self.context] for text in texts]


class QwenEncoder(PretrainedEncoder):
    """Qwen3's states of some layers, side by side; the model sees words before each word, and no padding."""

    title = TITLE

    def __init__(self, config: QwenConfig) -> None:
        super().__init__(config, _build(config))

    @property
    def table(self) -> nn.Embedding:
        """The token embeddings (V, D)."""
        return self.model.embed_tokens

    def _read_tokenizer(self) -> QwenTokenizer:
        folder = tokenizer_folder(self.config.tokenizer, TITLE, FORMS)
        return QwenTokenizer(folder, context=self.config.max_length, thinking=self.config.thinking)

    def forward(self, texts: Sequence[str]) -> Cond:
        """{"text": (B, T, D)} and, where the family masks, "mask" (B, T)."""
        return self.encode(*self.tokenizer.batch(self.tokenizer.rows(texts)))

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Cond:
        """States of token ids (B, T), True in `mask` where they are no padding; never under autocast.

        Without a `mask` ids of the padding are taken for padding.
        """
        tokens = tokens.to(self.table.weight.device)
        mask = padding_free(tokens, self) if mask is None else mask.to(tokens.device)
        with own_precision(tokens.device):
            states = self.model(
                inputs_embeds=self._embed(tokens),
                attention_mask=_seen(mask, self.dtype),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
        text = torch.cat([states[layer] for layer in self.config.layers], dim=-1)
        return {"text": text, "mask": mask} if self.config.masked else {"text": text}

    def place_rotary(self) -> None:
        """Compute the angles of the positions, which no file holds, where the weights are."""
        kind = type(self.model.rotary_emb)
        with torch.device(self.table.weight.device):
            self.model.rotary_emb = kind(self.model.config)


def _seen(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as transformers takes it; on the meta device, where it cannot look into one, one that is whole."""
    if not mask.is_meta:
        return mask.long()
    return torch.zeros(len(mask), 1, mask.shape[1], mask.shape[1], dtype=dtype, device="meta")


def _build(config: QwenConfig) -> nn.Module:
    transformers = transformers_for(f"the {TITLE}")
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "attention_bias",
    )
    settings = transformers.Qwen3Config(
        **{name: getattr(config, name) for name in names},
        rope_theta=config.rope_theta,
        hidden_act="silu",
        use_cache=False,
        tie_word_embeddings=True,
    )
    return transformers.Qwen3Model(settings)
