"""Where a prompt's words stand among the tokens that attention sees.

Legend: T tokens of the text as the network attends to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ldm.models.network import Network
from ldm.models.text import TextEncoder, TextTower
from ldm.sampling import prompt_to_prompt as p2p


@dataclass(frozen=True)
class Part:
    """A stretch of the text's tokens: `length` of them from `offset` on, by one tokenizer."""

    tokenizer: Any
    offset: int
    length: int

    def row(self, prompt: str) -> list[int]:
        """The prompt's token ids with the markers around them, without padding."""
        ids = self.tokenizer.encode(prompt)
        if hasattr(self.tokenizer, "framed"):
            return self.tokenizer.framed(ids)
        return [self.tokenizer.start, *ids, self.tokenizer.end] if hasattr(self.tokenizer, "start") else ids

    def places(self, prompt: str, word: str) -> list[int]:
        """Positions in T of a word; empty where this part has it not."""
        row, own = self.row(prompt), self.tokenizer.encode(word)
        for i in range(len(row) - len(own) + 1):
            if own and row[i : i + len(own)] == own:
                return list(range(self.offset + i, self.offset + i + len(own)))
        return []

    def edit(self, source: str, target: str) -> p2p.Edit:
        """How this part of the target's attention is made of the source's."""
        if source == target:
            return p2p.unchanged(self.length)
        before, after = self.row(source), self.row(target)
        swapped = all(a and b for a, b in p2p.spans(before, after))
        return (p2p.word_swap if swapped else p2p.refinement)(before, after, self.length)


@dataclass(frozen=True)
class Places:
    """The parts of the text that a network attends to, one after the other.

    CLIP towers stand side by side on the same tokens; what other encoders give follows them (T5 of SD3). FLUX.1 attends
    to T5's tokens alone.
    """

    parts: Sequence[Part]

    @staticmethod
    def of(network: Network, text: Sequence[TextEncoder]) -> Places:
        """Of a network and its text encoders."""
        if getattr(network.config, "kind", None) == "flux":
            text = text[-1:]
        towers = [encoder for encoder in text if isinstance(encoder, TextTower)]
        parts, offset = [], 0
        for encoder in [*towers[:1], *(e for e in text if not isinstance(e, TextTower))]:
            parts.append(Part(encoder.tokenizer, offset, encoder.context))
            offset += encoder.context
        return Places(parts)

    def edit(self, source: str, target: str) -> p2p.Edit:
        """A word swap in the parts where both prompts have tokens for it, a refinement in the others."""
        return p2p.joined([part.edit(source, target) for part in self.parts])

    def word(self, prompt: str, word: str) -> list[int]:
        """Positions of a word in all parts. Raises ValueError for one that is not in the prompt."""
        found = [i for part in self.parts for i in part.places(prompt, word)]
        if not found:
            raise ValueError(f"word {word!r} is not in the prompt {prompt!r}")
        return found

    def words(self, prompt: str, words: Sequence[str]) -> list[int]:
        """Positions of those of the words that the prompt has. Raises ValueError where it has none."""
        present = [w for w in words if w.lower() in prompt.lower().replace(",", " ").split()]
        if not present:
            raise ValueError(f"local: none of {list(words)} is a word of {prompt!r}")
        return [i for w in present for i in self.word(prompt, w)]
