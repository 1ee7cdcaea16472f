"""Pivotal tuning: new words and low-rank corrections train together (Roich 2021, arXiv 2106.05744, on text: cog-sdxl).

The words take up what can be named, so that the corrections change less of everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ldm.adapters.corrections import Correction, Corrections
from ldm.adapters.lora import LoraAdapter, LoraConfig, LoraNet
from ldm.adapters.tokens import NewToken, TokenRows, TokensAdapter, TokensConfig
from ldm.models.network import Around, Network
from ldm.models.text import TextEncoder

_LORA, _WORDS = "lora.", "words."


@dataclass(frozen=True, kw_only=True)
class PivotalConfig:
    """New `tokens` beside a `lora`; `max_norm` and `speed` of the tokens as in `TokensConfig`."""

    kind: Literal["pivotal"] = "pivotal"
    tokens: tuple[NewToken, ...]
    lora: LoraConfig = field(default_factory=LoraConfig)
    max_norm: float = 2.0
    speed: float = 3.0

    def __post_init__(self) -> None:
        _ = self.words

    @property
    def words(self) -> TokensConfig:
        """The tokens' own config. Raises ValueError as it does."""
        return TokensConfig(tokens=self.tokens, max_norm=self.max_norm, speed=self.speed)


class Pivotal(Around):
    """Both, called as the network is."""

    def __init__(self, network: Network, lora: Around, words: Around) -> None:
        super().__init__(network)
        self.lora, self.words = lora, words


class PivotalAdapter:
    """Rows of the text encoders and corrections of the network train; each is exported as its own adapter does it."""

    trains_text = True

    def __init__(self, config: PivotalConfig) -> None:
        self.config = config
        self._lora, self._words = LoraAdapter(config.lora), TokensAdapter(config.words)

    def attach(self, network: Network, text: Sequence[TextEncoder]) -> Pivotal:
        """Freeze the model, add the tokens and put the corrections on it. Raises ValueError as both adapters do."""
        words: TokenRows = self._words.attach(network, text)
        return Pivotal(network, self._lora.attach(network, text), words)

    def corrections(self, weights: Mapping[str, Tensor]) -> dict[str, Correction]:
        """The corrections, from the attached module's weights by name."""
        return self._lora.corrections(_part(weights, _LORA))

    def load(self, net: Pivotal, lora: Corrections) -> None:
        """As `LoraAdapter.load`."""
        assert isinstance(net.lora, LoraNet)
        self._lora.load(net.lora, lora)

    def concepts(self, weights: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Token -> its rows (n, D) of each tower, from the attached module's weights by name."""
        return self._words.concepts(_part(weights, _WORDS))

    def export(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Both adapters' tensors; their names do not meet."""
        return {**self._lora.export(_part(weights, _LORA)), **self._words.export(_part(weights, _WORDS))}


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
