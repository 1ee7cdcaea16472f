"""Textual inversion: new token embeddings are the only parameters (Gal 2022, arXiv 2208.01618).

Legend: n vectors of a token, D width of a tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from ldm.adapters.base import freeze
from ldm.adapters.sites import towers
from ldm.models.network import Around, Network
from ldm.models.text import TextEncoder

T = TypeVar("T", bound=TextEncoder)


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """`token` is what prompts say, such as "<thing>"; it stands for `vectors` embeddings.

    They start from `initializer`, words that are one token each: vector i from word i mod their number, and a single
    vector from the words' mean. Without words they start from the vocabulary's mean.
    """

    token: str
    vectors: int = 1
    initializer: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.vectors < 1:
            raise ValueError(f"vectors must be at least 1, got {self.vectors}")
        if not self.token or any(c.isspace() for c in self.token):
            raise ValueError(f"token {self.token!r}: expected one word without spaces, such as <thing>")


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """`max_norm` bounds each new vector's norm, in multiples of the vocabulary's median norm (0: no bound).

    `speed`: how many times as far as at the optimizer's rate Adam moves the vectors in a step.
    """

    kind: Literal["tokens"] = "tokens"
    tokens: tuple[NewToken, ...]
    max_norm: float = 2.0
    speed: float = 1.0

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("tokens must not be empty")
        names = [t.token for t in self.tokens]
        if len(set(names)) < len(names):
            raise ValueError(f"tokens: {sorted({n for n in names if names.count(n) > 1})} named twice")
        if self.max_norm < 0:
            raise ValueError(f"max_norm must be at least 0 (0 is no bound), got {self.max_norm}")
        if not self.speed > 0:
            raise ValueError(f"speed must be above 0, got {self.speed}")


class Rows(nn.Module):
    """New rows of one tower for one token, (n, D); called, it gives them within the norm's bound.

    What trains is the rows / `speed`: Adam's steps do not depend on a weight's scale.
    """

    def __init__(self, start: Tensor, bound: float, speed: float = 1.0) -> None:
        super().__init__()
        self.rows = nn.Parameter(start.detach().float() / speed)
        self.bound, self.speed = bound, speed

    def forward(self) -> Tensor:
        return within(self.rows * self.speed, self.bound)


class TokenRows(Around):
    """All new rows, by token and tower; called as the network is, which is frozen and not registered."""

    def __init__(self, network: Network, text: Sequence[TextEncoder], config: TokensConfig) -> None:
        super().__init__(network)
        self.tokens = nn.ModuleList()
        encoders = reading(text)
        for new in config.tokens:
            rows = nn.ModuleList(Rows(start(one, new), bound_of(one, config), config.speed) for one in encoders)
            for one, own in zip(encoders, rows, strict=True):
                one.add_token(new.token, new.vectors, own)
            self.tokens.append(rows)


class TokensAdapter:
    """New rows train, in every encoder; the export is named by token, a second one's behind `text_encoder_2.`"""

    trains_text = True

    def __init__(self, config: TokensConfig) -> None:
        self.config = config
        self._bounds: list[float] = []

    def attach(self, network: Network, text: Sequence[TextEncoder]) -> TokenRows:
        """Freeze the model and add the tokens to its towers; ValueError for a token that exists or a wrong start."""
        freeze(network, text)
        network.train()
        self._bounds = [bound_of(one, self.config) for one in reading(text)]
        return TokenRows(network, text, self.config)

    def concepts(self, weights: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Token -> its rows (n, D) of each tower, from the attached module's weights by name."""
        found = {}
        for i, new in enumerate(self.config.tokens):
            rows = [weights[f"tokens.{i}.{k}.rows"] for k in range(len(self._bounds))]
            rows = [r.float() * self.config.speed for r in rows]
            found[new.token] = [within(r, b) for r, b in zip(rows, self._bounds, strict=True)]
        return found

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows (n, D) by token; those of the second tower under `text_encoder_2.TOKEN`."""
        out = {}
        for token, rows in self.concepts(weights).items():
            out |= {("" if k == 0 else f"text_encoder_{k + 1}.") + token: r.contiguous() for k, r in enumerate(rows)}
        return out


def within(rows: Tensor, bound: float) -> Tensor:
    """Rows (n, D), those longer than `bound` shortened to it; a new tensor, differentiable."""
    if bound <= 0:
        return rows * 1.0
    return rows * (bound / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)


def reading(text: Sequence[T]) -> list[T]:
    """The text encoders that read tokens: without those that are left out, whose states are zeros."""
    return [one for one in text if next(one.parameters(), None) is not None]


def bound_of(tower: TextEncoder, config: TokensConfig) -> float:
    """The largest norm that a new row of this tower may have; 0 is none."""
    if not config.max_norm:
        return 0.0
    table = tower.table.weight.detach().float()
    return config.max_norm * float(table.norm(dim=1).median())


@torch.no_grad()
def start(tower: TextEncoder, new: NewToken) -> Tensor:
    """The rows (n, D) to start from. Raises ValueError for an initialiser that is not one token of this tower."""
    table = tower.table.weight.detach().float()
    if not new.initializer:
        return table[: tower.tokenizer.vocab_size].mean(0).expand(new.vectors, -1)
    ids = []
    for word in new.initializer:
        own = tower.tokenizer.encode(word)
        if len(own) != 1:
            parts = [tower.tokenizer.decode([i]) for i in own]
            raise ValueError(f"initializer {word!r} of {new.token}: is {len(own)} tokens {parts}; choose a word of one")
        ids.append(own[0])
    if new.vectors == 1:
        return table[ids].mean(0, keepdim=True)
    return table[[ids[i % len(ids)] for i in range(new.vectors)]]


_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL's second tower"}


def add_concept(text: Sequence[TextEncoder], token: str, rows: Sequence[Tensor], also: Sequence[str] = ()) -> list[str]:
    """Teach the towers a token from a file: its rows (n, D) for each; the words that call it, `also` where they can.

    Rows of the CLIP towers alone, which most files hold, leave other encoders as they are. A file's name that is a word
    of the vocabulary calls it in angle brackets. Raises ValueError when widths or the number of towers differ, or the
    token exists.
    """
    text = reading(text)
    clip = [one for _, one in towers(text)]
    if len(rows) != len(text):
        text = clip if len(rows) == len(clip) else text
    if len(rows) != len(text):
        raise ValueError(f"embedding {token!r}: is for {len(rows)} text towers, the model has {len(text)}")
    for tower, own in zip(text, rows, strict=True):
        if own.ndim != 2 or own.shape[1] != tower.width:
            widths = [f"{w} ({_WIDTHS[w]})" if w in _WIDTHS else str(w) for w in (own.shape[-1], tower.width)]
            raise ValueError(f"embedding {token!r}: has width {widths[0]}, the text tower {widths[1]}")
    words = [w for w in dict.fromkeys([token, *also]) if all(t.tokenizer.free(w) for t in text)]
    if not words and token in also and token not in text[0].tokenizer.added:
        words = [f"<{token}>"]
    for tower, own in zip(text, rows, strict=True):
        kept = own.detach().to(tower.table.weight)
        tower.add_token(words[0] if words else token, len(kept), lambda kept=kept: kept)
        for word in words[1:]:
            tower.tokenizer.alias(word, words[0])
    return words
