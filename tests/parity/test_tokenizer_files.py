"""Tokenizer files that disagree are read as transformers reads them, over a matrix of such files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ldm.checkpoint.opened import load_encoder
from ldm.checkpoint.tokenizers import END, START, find_tokenizer, load_tokenizer, save_tokenizer
from ldm.checkpoint.towers import open_text
from ldm.models.text import Added, TextTower, Tokenizer

torch.set_num_threads(1)
PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text("utf-8"))
CONTEXT = 16


def write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A folder with the vocabulary and merges of the small tokenizer alone."""
    folder = tmp_path_factory.mktemp("words") / "tokenizer"
    save_tokenizer(folder, Tokenizer("emoji", context=CONTEXT))
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def copy(words: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for path in words.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def rows(folder: Path, texts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """(theirs, ours), padded to CONTEXT."""
    theirs = CLIPTokenizer.from_pretrained(folder)
    found = find_tokenizer(folder, CONTEXT)
    ours = Tokenizer(found.bpe, context=CONTEXT, pad=found.pad, added=found.added, special=True)
    want = theirs(texts, padding="max_length", max_length=CONTEXT, truncation=True).input_ids
    return want, ours(texts).tolist()


def token(text: str) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


ABSENT: Any = ...
OF_MAP = [ABSENT, "!", END, token("!"), token(END)]
OF_CONFIG = [ABSENT, "!", END, *({"__type": "AddedToken", **token(t)} for t in ("!", END))]


@pytest.mark.parametrize("listed", [False, True], ids=["", "added_tokens_decoder"])
@pytest.mark.parametrize(("of_map", "of_config"), list(itertools.product(OF_MAP, OF_CONFIG)))
def test_padding(words, tmp_path, of_map, of_config, listed):
    """The map over the config, unless this lists added tokens (huggingface/diffusers#2201)."""
    folder = copy(words, tmp_path / "t")
    if of_map is not ABSENT:
        write(folder / "special_tokens_map.json", {"pad_token": of_map, "bos_token": START, "eos_token": token(END)})
    config: dict[str, Any] = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT}
    if listed:
        config["added_tokens_decoder"] = {
            str(i): {**token(t), "special": True} for t, i in ((START, 4094), (END, 4095))
        }
    if of_config is not ABSENT:
        config["pad_token"] = of_config
    write(folder / "tokenizer_config.json", config)
    want, got = rows(folder, ["a red apple", ""])
    assert got == want


@pytest.mark.parametrize("name", [n for n in PUBLISHED if "tokenizer/tokenizer_config.json" in PUBLISHED[n]])
def test_published(tmp_path, name):
    """Every published folder pads as transformers does: SD 2.x and SDXL's second with token 0."""
    for part in ("tokenizer", "tokenizer_2"):
        if f"{part}/tokenizer_config.json" not in PUBLISHED[name]:
            continue
        folder = tmp_path / part
        save_tokenizer(folder, Tokenizer("standard", context=77))
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            write(folder / file, PUBLISHED[name][f"{part}/{file}"])
        theirs = CLIPTokenizer.from_pretrained(folder)
        want = theirs(["a red apple"], padding="max_length", max_length=77).input_ids
        bpe, pad = load_tokenizer(folder, 77)
        assert bpe == "standard"
        assert Tokenizer(bpe, context=77, pad=pad)(["a red apple"]).tolist() == want


MARKS = [
    "!", "a cat!", "a cat !", "wow! so big", "! wow", "a!b", "a ! b", "!!!", "!?", "(!)", " !  ", "Hi!Bye !!",
    "\u00a1hola!",
    "a<|endoftext|>b", "<|startoftext|> a !", "<|ENDOFTEXT|>", "a! <Dog>!",
]  # fmt: skip


@pytest.mark.parametrize("again", [False, True], ids=["", "saved by transformers"])
@pytest.mark.parametrize("added", [False, True], ids=["", "added tokens"])
@pytest.mark.parametrize("pad", ["!", END, {**token("!"), "normalized": False}], ids=["!", "end", "!, as settings"])
def test_special_tokens_in_prompts(words, tmp_path, pad, added, again):
    """ "!" as the token of padding is one wherever it stands; where the end token pads, it is a letter as others."""
    folder = copy(words, tmp_path / "t")
    write(folder / "special_tokens_map.json", {"pad_token": pad, "bos_token": START, "eos_token": END})
    write(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT})
    if added:
        write(folder / "added_tokens.json", {"<cat-toy>": 4096, "<Dog>": 4097})
    if again:
        CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
        folder = tmp_path / "again"
    want, got = rows(folder, MARKS)
    assert got == want
    assert (want[1][3] == 0) == (pad != END)


ADDED = {"<cat-toy>": 4096, "<Dog>": 4097, "green frog": 4098}
PROMPTS = ["a <cat-toy> here", "a<cat-toy>s", "<DOG> and <dog>", "the green  Frog", "<cat-toys> <cat", "nothing new"]


@pytest.mark.parametrize("form", ["added_tokens.json", "tokenizer.json", "added_tokens_decoder", "special"])
def test_added_tokens(words, tmp_path, form):
    folder = copy(words, tmp_path / "t")
    config: dict[str, Any] = {"model_max_length": 10**30, "tokenizer_class": "CLIPTokenizer"}
    if form == "tokenizer.json":
        theirs = CLIPTokenizer.from_pretrained(folder)
        theirs.add_tokens(list(ADDED))
        theirs.save_pretrained(folder)
        (folder / "vocab.json").unlink(missing_ok=True)
    elif form == "added_tokens.json":
        write(folder / form, ADDED)
    elif form == "special":
        write(folder / "special_tokens_map.json", {"additional_special_tokens": list(ADDED), "pad_token": "!"})
    else:
        tokens = {str(i): {**token(t), "special": False} for t, i in ADDED.items()}
        ends = {str(i): {**token(t), "special": True} for t, i in ((START, 4094), (END, 4095))}
        config["added_tokens_decoder"] = {**ends, **tokens}
    write(folder / "tokenizer_config.json", config)
    want, got = rows(folder, PROMPTS)
    assert got == want
    assert max(max(row) for row in got) >= 4096


def test_merges_in_other_forms(words, tmp_path):
    """Windows' line ends and no header line, as in files that were copied by hand."""
    folder = copy(words, tmp_path / "t")
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")
    (folder / "merges.txt").write_bytes("\r\n".join(lines[1:]).encode())
    assert load_tokenizer(folder, CONTEXT)[0] == "emoji"


def test_several_vectors_of_one_token(words, tmp_path):
    """diffusers saves a token of three vectors as <t>, <t>_1, <t>_2, and its pipelines put all in for <t>."""
    folder = copy(words, tmp_path / "t")
    write(folder / "added_tokens.json", {"<t>": 4096, "<t>_1": 4097, "<t>_2": 4098})
    theirs = CLIPTokenizer.from_pretrained(folder)
    prompt = TextualInversionLoaderMixin().maybe_convert_prompt("a <t> here", theirs)
    found = find_tokenizer(folder, CONTEXT)
    ours = Tokenizer(found.bpe, context=CONTEXT, added=found.added)
    assert ours.encode("a <t> here") == theirs(prompt).input_ids[1:-1]
    assert ours.encode("<t>_1") == [4097]


@pytest.mark.parametrize(
    ("file", "data", "words_of_it"),
    [
        ("tokenizer_config.json", {"pad_token": "cat"}, "pad_token 'cat' is not one of"),
        ("tokenizer_config.json", {"eos_token": "!"}, "eos_token '!' is not supported"),
        ("tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"}, "tokenizer_class 'T5Tokenizer'"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "model_max_length 'long'"),
        ("added_tokens.json", {"<a>": 5000}, "'<a>' with id 5000"),
        ("added_tokens.json", {"<a>": 7}, "'<a>' with id 7"),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": []}}, "'Unigram' is not CLIP's BPE"),
    ],
)
def test_what_is_not_supported(words, tmp_path, file, data, words_of_it):
    folder = copy(words, tmp_path / "t")
    write(folder / file, data)
    with pytest.raises(ValueError, match=words_of_it):
        find_tokenizer(folder, CONTEXT)


def clip(folder: Path, tokens: int, eos: int) -> CLIPTextModelWithProjection:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3,
        "vocab_size": tokens, "max_position_embeddings": CONTEXT, "projection_dim": 24, "hidden_act": "gelu",
    }  # fmt: skip
    model = CLIPTextModelWithProjection(CLIPTextConfig(**settings, bos_token_id=4094, eos_token_id=eos)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("eos", [2, 4095])
@torch.no_grad()
def test_states_and_pooled_vector(words, tmp_path, eos):
    """The added row is used, and the pooled vector is taken where transformers takes it for this `eos_token_id`."""
    folder = copy(words, tmp_path / "tokenizer")
    write(folder / "added_tokens.json", {"<t>": 4096})
    theirs = clip(tmp_path / "text_encoder", 4097, eos)
    tower = load_encoder(open_text(tmp_path / "text_encoder", folder, output="penultimate"), torch.float32)
    ids = CLIPTokenizer.from_pretrained(folder)(["a <t> here"], padding="max_length", max_length=CONTEXT)
    want = theirs(torch.tensor(ids.input_ids), output_hidden_states=True)
    got = tower(["a <t> here"])
    assert (got["text"] - want.hidden_states[-2]).norm() < 1e-5 * got["text"].norm()
    assert (got["pooled"] - want.text_embeds).norm() < 1e-5 * got["pooled"].norm()


def test_fewer_tokens_than_positions(words, tmp_path):
    """SDXL's pipeline pads to the tokenizer's `model_max_length`."""
    folder = copy(words, tmp_path / "tokenizer")
    write(folder / "tokenizer_config.json", {"model_max_length": 8})
    clip(tmp_path / "text_encoder", 4096, 4095)
    config = open_text(tmp_path / "text_encoder", folder).config
    assert (config.context_length, config.max_length) == (CONTEXT, 8)
    assert TextTower(config)(["a red apple"])["text"].shape == (1, 8, 32)


def test_a_token_without_a_row_is_named(words, tmp_path, caplog):
    folder = copy(words, tmp_path / "tokenizer")
    write(folder / "added_tokens.json", {"<t>": 4096})
    clip(tmp_path / "text_encoder", 4096, 4095)
    assert open_text(tmp_path / "text_encoder", folder).config.added == ()
    assert "<t>" in caplog.text


def test_added_tokens_come_back(tmp_path):
    added = (Added(text="<a>", id=4096), Added(text="<b>", id=4097))
    save_tokenizer(tmp_path / "t", Tokenizer("emoji", context=CONTEXT, added=added), added)
    assert find_tokenizer(tmp_path / "t", CONTEXT).added == added
    assert CLIPTokenizer.from_pretrained(tmp_path / "t")("a <b>").input_ids[2] == 4097
