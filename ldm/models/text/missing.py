"""A text encoder that is left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.models.text.base import TextEncoder
from ldm.models.text.config import MissingConfig
from ldm.models.text.tokenizer import Overlong
from ldm.types import Cond


class NoTokenizer:
    """Has no tokens for any text: nothing is cut off."""

    vocab_size = 0

    def __init__(self, context: int) -> None:
        self.context, self.limit = context, context
        self.added: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, 0) int64."""
        return torch.zeros(len(texts), 0, dtype=torch.int64)

    def too_long(self, texts: Sequence[str]) -> list[Overlong]:
        """None."""
        return []

    def encode(self, text: str) -> list[int]:
        """No ids."""
        return []

    def decode(self, ids: Sequence[int]) -> str:
        """No text."""
        return ""


class MissingT5(TextEncoder):
    """Zeros in the place of the T5 encoder of SD3, which was trained to do without it at times.

    The family's pipeline keeps the tokens: the network attends to 256 zeros.
    """

    title = "text encoder that is left out"

    def __init__(self, config: MissingConfig) -> None:
        super().__init__(config)
        self.model = nn.Module()
        self.tokenizer = NoTokenizer(config.tokens)
        self.register_buffer("zero", torch.zeros(()), persistent=False)
        self.eval()

    @property
    def width(self) -> int:
        """D."""
        return self.config.width

    @property
    def table(self) -> nn.Embedding:
        """Raises ValueError."""
        raise ValueError(f"the {self.title} has no tokens")

    def add_token(self, token: str, count: int, rows: object) -> None:
        """Raises ValueError."""
        raise ValueError(f"token {token!r}: the {self.title} cannot have it")

    def forward(self, texts: Sequence[str]) -> Cond:
        """{"text": zeros (B, T, D)}."""
        zero: Tensor = self.get_buffer("zero")
        return {"text": zero.expand(len(texts), self.config.tokens, self.config.width)}
