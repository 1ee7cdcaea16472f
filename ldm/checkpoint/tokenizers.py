"""Tokenizers as Hugging Face's files: `vocab.json` with `merges.txt`, or one `tokenizer.json`.

Where files disagree, the precedence is that of transformers: `tokenizer.json` over the two others, and
`special_tokens_map.json` with `added_tokens.json` over `tokenizer_config.json`, unless that lists its added tokens.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoint.settings import read_json
from ldm.models.text import Added, Pad, Tokenizer
from ldm.models.text.tokenizer import END, START

HEADER = "#version: 0.2"
_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class Found:
    """What a TextConfig is told of the tokenizer in a folder; `length`: tokens that it cuts at, if it says so."""

    bpe: str
    pad: Pad
    added: tuple[Added, ...]
    length: int | None


def save_tokenizer(folder: Path, tokenizer: Tokenizer, added: tuple[Added, ...] = ()) -> None:
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
    if added:
        _write(folder / "added_tokens.json", {token.text: token.id for token in added})


def load_tokenizer(folder: Path, context: int) -> tuple[str, Pad]:
    """(`bpe`, `pad`) of a TextConfig for the tokenizer in a folder; see `find_tokenizer`."""
    found = find_tokenizer(folder, context)
    return found.bpe, found.pad


def find_tokenizer(folder: Path, context: int) -> Found:
    """What the tokenizer in a folder is; `context` is that of its text encoder.

    Raises ValueError if its ids are not those that CLIP's rule gives to its merges, and naming the key for markers,
    padding or added tokens that are not supported.
    """
    vocabulary, merges = _read(folder)
    told = _settings(folder, vocabulary)
    pad = _pad(told, vocabulary, folder)
    bpe = _bpe(folder, vocabulary, merges, pad, context)
    return Found(bpe, pad, _added(told["added"], vocabulary, folder), _length(told, folder))


def _bpe(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], pad: Pad, context: int) -> str:
    for bpe in ("standard", "emoji"):
        if _same(Tokenizer(bpe, context=context, pad=pad), vocabulary, merges):
            return bpe
    path = folder / "merges.txt"
    if not path.is_file() or not path.read_text(encoding="utf-8").startswith("#version"):
        path = Path(tempfile.mkdtemp(prefix="ldm-bpe-")) / "merges.txt"
        path.write_text("\n".join([HEADER, *(" ".join(m) for m in merges)]) + "\n", encoding="utf-8")
    if not _same(Tokenizer(str(path), context=context, pad=pad), vocabulary, merges):
        raise ValueError(f"{folder}: its ids are not those of a CLIP tokenizer with these merges")
    return str(path)


def _read(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges)."""
    if (folder / "tokenizer.json").is_file():
        model = _json(folder / "tokenizer.json").get("model") or {}
        if isinstance(model.get("vocab"), dict) and isinstance(model.get("merges"), list):
            return model["vocab"], [_merge(m, folder) for m in model["merges"]]
        raise ValueError(f"{folder / 'tokenizer.json'}: model {model.get('type')!r} is not CLIP's BPE")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8-sig").split("\n")
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
        return _json(folder / "vocab.json"), [_merge(line, folder) for line in merges]
    raise ValueError(f"{folder}: no vocab.json with merges.txt, and no tokenizer.json")


def _merge(line: str | list[str], folder: Path) -> tuple[str, str]:
    parts = line.split() if isinstance(line, str) else line
    if len(parts) != 2:
        raise ValueError(f"{folder}: a merge has two parts, got {line!r}")
    return parts[0], parts[1]


def _settings(folder: Path, vocabulary: dict[str, int]) -> dict[str, Any]:
    """Special tokens by key, `model_max_length`, and under "added" tokens by id, as transformers joins the files."""
    told = _json(folder / "tokenizer_config.json")
    cls = told.get("tokenizer_class")
    if cls is not None and cls not in _CLASSES:
        raise ValueError(f"{folder}: tokenizer_class {cls!r} is not one of {list(_CLASSES[:2])}")
    if (listed := told.get("added_tokens_decoder")) is not None:  # then these files are not read
        return told | {"added": {int(i): token for i, token in listed.items()}}
    told |= _json(folder / "special_tokens_map.json")
    added: dict[int, Any] = {i: token for token, i in _json(folder / "added_tokens.json").items()}
    for token in _json(folder / "tokenizer.json").get("added_tokens") or []:
        added[int(token["id"])] = token
    for token in [*(told.get("additional_special_tokens") or []), *(told.get("extra_special_tokens") or [])]:
        if _text(token) not in (*vocabulary, *map(_text, added.values())):  # transformers adds it behind the others
            added[max([*added, len(vocabulary) - 1]) + 1] = {"content": _text(token), "special": True}
    return told | {"added": added}


def _text(token: Any) -> str | None:
    """A token as a string or as its settings."""
    return token.get("content") if isinstance(token, dict) else token


def _pad(told: dict[str, Any], vocabulary: dict[str, int], folder: Path) -> Pad:
    """What follows the end token: SD 1.x repeats it, open_clip's towers take token 0, which is "!"."""
    for key, only in (("bos_token", START), ("eos_token", END)):
        if (token := _text(told.get(key))) not in (None, only):
            raise ValueError(f"{folder}: {key} {token!r} is not supported; only {only!r} is")
    token = _text(told.get("pad_token")) or END
    if token != END and vocabulary.get(token) != 0:
        first = next((t for t, i in vocabulary.items() if i == 0), "!")
        raise ValueError(f"{folder}: pad_token {token!r} is not one of {[END, first]}")
    return "eot" if token == END else "zero"


def _added(listed: dict[int, Any], vocabulary: dict[str, int], folder: Path) -> tuple[Added, ...]:
    """Tokens beyond the vocabulary, in the order of their ids, which follow it without a gap."""
    found = []
    for i, token in sorted(listed.items()):
        text = _text(token)
        if vocabulary.get(str(text)) == i:
            continue
        flags = token if isinstance(token, dict) else {}
        if not text or flags.get("single_word") or i != len(vocabulary) + len(found):
            raise ValueError(
                f"{folder}: added token {text!r} with id {i} is not supported; only ids that follow the vocabulary's "
                f"{len(vocabulary)} one by one, of tokens without single_word, are"
            )
        found.append(Added(text=text, id=i, any_case=bool(flags.get("normalized", not flags.get("special")))))
    return tuple(found)


def _length(told: dict[str, Any], folder: Path) -> int | None:
    """`model_max_length`; transformers writes about 1e30 for none."""
    length = told.get("model_max_length")
    if length is None:
        return None
    if isinstance(length, bool) or not isinstance(length, (int, float)) or length != int(length) or length < 3:
        raise ValueError(f"{folder}: model_max_length {length!r} is not a whole number of at least 3")
    return None if length > 1e6 else int(length)


def _same(tokenizer: Tokenizer, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> bool:
    return (
        len(vocabulary) == tokenizer.vocab_size
        and tokenizer.vocabulary() == vocabulary
        and tokenizer.merges() == merges
    )


def _json(path: Path) -> dict[str, Any]:
    """Keys and values of a file, none if it is missing. Raises ValueError naming it for anything else."""
    return read_json(path) if path.is_file() else {}


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
