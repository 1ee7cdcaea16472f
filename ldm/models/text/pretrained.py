"""transformers' tokenizers from their files, and what encoders that are transformers' own modules share.

Legend: B batch, T tokens of the context.
"""

from __future__ import annotations

import re
import shutil
from abc import abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.models.text.base import TextEncoder
from ldm.models.text.int8 import quantize
from ldm.models.text.tokenizer import Overlong, whole_word
from ldm.models.wide import quickened

FILES = (
    "tokenizer.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer, as transformers writes them."""


def transformers_for(what: str) -> Any:
    """The package; ValueError where it is not installed, naming what needs it."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{what} needs transformers: pip install 'ldm[transformers]'") from error
    return transformers


def copy_tokenizer(source: Path, target: Path) -> None:
    """Write the files of a tokenizer into another folder, whole. Raises ValueError where there are none."""
    found = [source / name for name in FILES if (source / name).is_file()]
    if not found:
        raise ValueError(f"tokenizer {str(source)!r}: no files of a tokenizer there")
    target.mkdir(parents=True, exist_ok=True)
    for path in found:
        if path.resolve() != (target / path.name).resolve():
            shutil.copyfile(path, target / path.name)


def tokenizer_folder(folder: Path | None, title: str, forms: Sequence[tuple[str, ...]]) -> Path:
    """`folder`, if it has all files of one of the `forms`; ValueError telling what to give if not."""
    wanted = " or ".join(" with ".join(form) for form in forms)
    if folder is None:
        raise ValueError(f"the {title} has no tokenizer: set `tokenizer` to a folder with {wanted}")
    if not any(all((folder / name).is_file() for name in form) for form in forms):
        raise ValueError(f"tokenizer {str(folder)!r}: the {title} needs a folder with {wanted}")
    return folder


class PretrainedTokenizer:
    """A tokenizer of transformers, with tokens that a user adds; cuts at `context` tokens and pads up to it."""

    def __init__(self, fast: Any, folder: Path, context: int) -> None:
        self.folder, self.context = folder, context
        self.pad: int = fast.pad_token_id
        self.vocab_size: int = len(fast)
        self.added: dict[str, list[int]] = {}
        self._fast = fast
        fast.backend_tokenizer.no_truncation()
        fast.backend_tokenizer.no_padding()

    @property
    @abstractmethod
    def limit(self) -> int:
        """How many tokens of a prompt's own fit."""

    @abstractmethod
    def framed(self, ids: Sequence[int]) -> list[int]:
        """A prompt's own ids as the encoder takes them: cut at `limit`, with the tokens around them."""

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """What the encoder takes of each text, without padding."""
        if isinstance(texts, str):
            raise ValueError("expected a list of prompts, got one string")
        return [self.framed(self.encode(text)) for text in texts]

    def batch(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids (B, T) int64 and where they are no padding (B, T)."""
        ids = torch.full((len(rows), self.context), self.pad, dtype=torch.int64)
        mask = torch.zeros(len(rows), self.context, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, : len(row)] = True
        return ids, mask

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, T) int64."""
        return self.batch(self.rows(texts))[0]

    def too_long(self, texts: Sequence[str]) -> list[Overlong]:
        """The prompts of which `__call__` leaves out the end."""
        ids = [self.encode(text) for text in texts]
        limit = self.limit
        return [Overlong(i, len(x), limit, self.decode(x[limit:])) for i, x in enumerate(ids) if len(x) > limit]

    def encode(self, text: str) -> list[int]:
        """Ids of one text without the tokens around it, of any length; an added token stands for all its ids."""
        if not self.added:
            return self._plain(text)
        words = sorted(self.added, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(whole_word, words)) + ")", text)
        return [i for part in parts for i in self.added.get(part) or (self._plain(part) if part else [])]

    def _plain(self, text: str) -> list[int]:
        return self._fast.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; of an added token's ids the first one is its name."""
        names = {own[0]: token for token, own in reversed(self.added.items())}
        extra = {i for own in self.added.values() for i in own}
        parts: list[str] = []
        run: list[int] = []
        for i in [*ids, -1]:
            if i >= 0 and i not in extra:
                run.append(i)
                continue
            parts += [self._fast.decode(run, skip_special_tokens=True).strip()] if run else []
            parts += [names[i]] if i in names else []
            run = []
        return " ".join(part for part in parts if part)

    def add(self, token: str, ids: Sequence[int]) -> None:
        """Let a token stand for ids. Raises ValueError when the vocabulary or an earlier addition has it."""
        if not token or token != " ".join(token.split()):
            raise ValueError(f"token {token!r}: expected words with one space between them, such as <thing>")
        if token in self.added:
            raise ValueError(f"token {token!r}: exists already; choose another name")
        if len(known := self._plain(token)) < 2:
            raise ValueError(
                f"token {token!r}: the vocabulary has it already ({known}); choose another, such as <thing>"
            )
        self.added[token] = list(ids)

    def free(self, token: str) -> bool:
        """Whether `add` would take it."""
        return bool(token) and token not in self.added and len(self._plain(token)) > 1

    def alias(self, token: str, of: str) -> None:
        """Let another name stand for what an added token stands for."""
        self.add(token, self.added[of])

    def save(self, folder: Path) -> None:
        """Write its files into another folder as they are; added tokens are the user's and not among them."""
        copy_tokenizer(self.folder, folder)


class PretrainedEncoder(TextEncoder):
    """A frozen encoder that is a module of transformers; its tokenizer's files are read when they are first needed."""

    linear_in_float32: ClassVar[tuple[str, ...]] = ()
    """Last words of the names of linear layers whose values are too large for float16."""

    def __init__(self, config: Any, model: nn.Module) -> None:
        super().__init__(config)
        self.model = quickened(model)
        self._tokenizer: PretrainedTokenizer | None = None
        self.requires_grad_(False).eval()

    @abstractmethod
    def _read_tokenizer(self) -> PretrainedTokenizer:
        """Raises ValueError where its files are missing."""

    @property
    def tokenizer(self) -> PretrainedTokenizer:  # type: ignore[override]
        """Raises ValueError where its files are missing."""
        if self._tokenizer is None:
            found = self._read_tokenizer()
            if found.vocab_size > (rows := self.config.vocab_size):
                raise ValueError(f"vocab_size {rows}: tokenizer {str(found.folder)!r} has {found.vocab_size} tokens")
            self._tokenizer = found
        return self._tokenizer

    @property
    def width(self) -> int:
        """D."""
        return self.config.width

    @property
    def context(self) -> int:
        """T."""
        return self.config.max_length

    def kept(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The type that a weight of the model is kept in where `dtype` is asked for."""
        wide = name.split(".")[-2:-1] and name.split(".")[-2] in self.linear_in_float32
        return torch.float32 if wide and dtype == torch.float16 else dtype

    def _apply(self, fn: Any, recurse: bool = True) -> PretrainedEncoder:
        wide = [
            (module, module.weight.data)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name.split(".")[-1] in self.linear_in_float32
        ]
        angles = [(m, name, buffer) for m in self.model.modules() for name, buffer in m.named_buffers(recurse=False)]
        super()._apply(fn, recurse)
        for module, name, before in angles:  # frequencies of rotary positions: rounded ones turn far tokens elsewhere
            now = getattr(module, name)
            if now.is_floating_point() and now.element_size() < 4:
                setattr(module, name, before.to(now.device))
        for module, before in wide:
            if module.weight.dtype == torch.float16:  # from the values before: the new ones are rounded
                module.weight.data = before.to(module.weight.device, torch.float32)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The type of its states."""
        return self.table.weight.dtype

    def quantize_8bit(self) -> PretrainedEncoder:
        """Keep the weights of all linear layers in 8 bits, each row with a scale of its own; embeddings and norms stay.

        For use alone: the weights can no longer be written to a file.
        """
        quantize(self.model, self.linear_in_float32)
        return self


def padding_free(tokens: Tensor, encoder: PretrainedEncoder) -> Tensor:
    """Where ids (B, T) are not the padding's; without a tokenizer's files for ids on the meta device."""
    if tokens.is_meta:
        return torch.ones_like(tokens, dtype=torch.bool)
    return tokens != encoder.tokenizer.pad


def has_sentencepiece() -> bool:
    """Whether transformers can read `spiece.model`."""
    return find_spec("sentencepiece") is not None and find_spec("google.protobuf") is not None
