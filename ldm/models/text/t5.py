"""T5's encoder by transformers: SD3, FLUX.1 and PixArt read prompts with it.

Legend: B batch, T tokens of the context, D width of the states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.text.base import TextEncoder, own_precision
from ldm.models.text.config import MissingConfig, T5Config
from ldm.models.text.pretrained import PretrainedTokenizer, the_package
from ldm.types import Cond

_OURS = ("kind", "max_length", "masked", "lower", "tokenizer")


class T5Encoder(TextEncoder):
    """A frozen T5 encoder: prompts -> tokens -> the states of the last layer, in the weights' own precision.

    The captions that PixArt's pipeline cleans (links, addresses) are only put in small letters.
    """

    title = "T5 encoder"

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        transformers = the_package("a T5 text encoder")
        keys = {key: value for key, value in asdict(config).items() if key not in _OURS}
        self.model = transformers.T5EncoderModel(transformers.T5Config(**keys, is_encoder_decoder=False))
        self.tokenizer: Any = None
        if config.tokenizer is not None:
            self.tokenizer = PretrainedTokenizer(config.tokenizer, config.max_length)
        self.requires_grad_(False).eval()

    @property
    def width(self) -> int:
        """D."""
        return self.config.d_model

    @property
    def context(self) -> int:
        """T."""
        return self.config.max_length

    @property
    def table(self) -> nn.Embedding:
        return self.model.shared

    def forward(self, texts: Sequence[str]) -> Cond:
        """{"text": (B, T, D)}, with "mask" (B, T) where the family masks its padding."""
        if self.tokenizer is None:
            raise ValueError(f"the {self.title} has no tokenizer: give its folder, with tokenizer.json or spiece.model")
        if self.config.lower:
            texts = [text.lower().strip() for text in texts]
        return self.encode(*self.tokenizer.both(texts))

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> Cond:
        """The same of token ids (B, T) and the mask of those that are no padding; never under autocast."""
        device = self.table.weight.device
        tokens = tokens.to(device)
        seen = mask.to(device) if mask is not None and self.config.masked else None
        with own_precision(device):
            states = self.model(inputs_embeds=self._embed(tokens), attention_mask=seen).last_hidden_state
        return {"text": states} if seen is None else {"text": states, "mask": seen}

    def kept(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The feed-forward's second layer overflows in float16."""
        return torch.float32 if dtype == torch.float16 and ".wo." in name else dtype


class MissingEncoder(TextEncoder):
    """Stands for an encoder that is left out: its states are zeros (SD3 without T5)."""

    title = "missing text encoder"
    model = None
    tokenizer = None

    def __init__(self, config: MissingConfig) -> None:
        super().__init__(config)
        self.register_buffer("place", torch.zeros(()), persistent=False)

    @property
    def width(self) -> int:
        """D."""
        return self.config.width

    @property
    def context(self) -> int:
        """T."""
        return self.config.tokens

    @property
    def table(self) -> nn.Embedding:
        raise ValueError(f"the {self.title} has no token embeddings")

    def forward(self, texts: Sequence[str]) -> Cond:
        """{"text": zeros (B, T, D)}."""
        return {"text": self.get_buffer("place").new_zeros(len(texts), self.context, self.width)}
