"""Tokenizers as Hugging Face's files: `vocab.json` with `merges.txt`, or one `tokenizer.json`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from ldm.models.text import Pad, Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
HEADER = "#version: 0.2"


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """The files that transformers' CLIPTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    pad = END if tokenizer.pad == "eot" else "!"
    merges = "\n".join(" ".join(pair) for pair in tokenizer.merges())
    special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": tokenizer.context,
        "tokenizer_class": "CLIPTokenizer",
        **special,
    }
    _write(folder / "vocab.json", tokenizer.vocabulary())
    (folder / "merges.txt").write_text(f"{HEADER}\n{merges}\n", encoding="utf-8")
    _write(folder / "special_tokens_map.json", special)
    _write(folder / "tokenizer_config.json", config)


def load_tokenizer(folder: Path, context: int) -> tuple[str, Pad]:
    """(`bpe`, `pad`) of a TextConfig for the tokenizer in a folder.

    Raises ValueError if its ids are not those that CLIP's rule gives to its merges.
    """
    vocabulary, merges = _read(folder)
    pad = _pad(folder)
    for bpe in ("standard", "emoji"):
        if _same(Tokenizer(bpe, context=context, pad=pad), vocabulary, merges):
            return bpe, pad
    path = folder / "merges.txt"
    if not path.is_file():
        path = Path(tempfile.mkdtemp(prefix="ldm-bpe-")) / "merges.txt"
        path.write_text("\n".join([HEADER, *(" ".join(m) for m in merges)]) + "\n", encoding="utf-8")
    if not _same(Tokenizer(str(path), context=context, pad=pad), vocabulary, merges):
        raise ValueError(f"{folder}: its ids are not those of a CLIP tokenizer with these merges")
    return str(path), pad


def _read(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        return vocabulary, [_merge(line, folder) for line in lines[1:] if line.strip()]
    if (folder / "tokenizer.json").is_file():
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        return model["vocab"], [_merge(m, folder) for m in model["merges"]]
    raise ValueError(f"{folder}: no vocab.json with merges.txt, and no tokenizer.json")


def _merge(line: str | list[str], folder: Path) -> tuple[str, str]:
    parts = line.split() if isinstance(line, str) else line
    if len(parts) != 2:
        raise ValueError(f"{folder}: a merge has two parts, got {line!r}")
    return parts[0], parts[1]


def _pad(folder: Path) -> Pad:
    """What follows the end token: SD 1.x repeats it, open_clip's towers take token 0, which is "!"."""
    token: Any = END
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            token = json.loads((folder / name).read_text(encoding="utf-8")).get("pad_token", token)
    token = token["content"] if isinstance(token, dict) else token
    if token not in (END, "!"):
        raise ValueError(f"{folder}: pad_token {token!r} is not one of {[END, '!']}")
    return "eot" if token == END else "zero"


def _same(tokenizer: Tokenizer, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> bool:
    return (
        len(vocabulary) == tokenizer.vocab_size
        and tokenizer.vocabulary() == vocabulary
        and tokenizer.merges() == merges
    )


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
