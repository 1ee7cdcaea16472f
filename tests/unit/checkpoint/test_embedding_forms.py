"""Embedding files in every form that people have: what calls them, which tower they are for, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.checkpoint.attached import attach_embedding
from ldm.checkpoint.embedding_files import read_embeddings
from ldm.cli.sample import main as sample
from ldm.models.text import TextConfig, TextTower

WIDTH = 16


def tower(width: int = WIDTH) -> TextTower:
    torch.manual_seed(0)
    return TextTower(TextConfig(width=width, heads=2, layers=1, context_length=12, vocab_size=4096, bpe="emoji"))


def rows(count: int, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def says(own: TextTower, word: str, values: Tensor) -> bool:
    """Whether the word stands for these vectors, between other words."""
    ids = own.tokenizer.encode(f"a red {word}, apple")
    new = [i for i in ids if i >= 4096]
    embedded = own._embed(torch.tensor([new or [0]]))[0]
    return len(new) == len(values) and torch.allclose(embedded, values, atol=1e-6)


def test_the_files_name_calls_it_too(tmp_path: Path) -> None:
    """diffusers says the token in the file, A1111 and ComfyUI the file's name."""
    save_file({"<cat-toy>": rows(2)}, tmp_path / "My-Style.safetensors")
    own = tower()
    assert attach_embedding([own], tmp_path / "My-Style.safetensors", None) == ["<cat-toy>", "My-Style"]
    assert says(own, "<cat-toy>", rows(2))
    assert says(own, "My-Style", rows(2))
    assert not says(own, "NotMy-Styles", rows(2))  # a part of a longer word is not it
    assert own.tokenizer.decode(own.tokenizer.encode("<cat-toy>")) == "<cat-toy>"
    renamed = tower()
    assert attach_embedding([renamed], tmp_path / "My-Style.safetensors", "<mine>") == ["<mine>"]


@pytest.mark.parametrize("name", ["path with spaces", "two  gaps", "bad-hands (v2)", "ünïcode-größe", "1.5_neg"])
def test_names_of_any_kind(name: str, tmp_path: Path) -> None:
    save_file({"emb_params": rows(2)}, tmp_path / f"{name}.safetensors")
    own = tower()
    word = " ".join(name.split())
    assert attach_embedding([own], tmp_path / f"{name}.safetensors", None) == [word]
    assert says(own, word, rows(2))


def test_a_file_called_as_a_word_of_the_vocabulary(tmp_path: Path) -> None:
    own = tower()
    assert len(own.tokenizer.encode("cat")) == 1
    save_file({"emb_params": rows(1)}, tmp_path / "cat.safetensors")
    assert attach_embedding([own], tmp_path / "cat.safetensors", None) == ["<cat>"]
    assert says(own, "<cat>", rows(1))
    assert max(own.tokenizer.encode("cat")) < 4096
    with pytest.raises(ValueError, match="exists already"):
        attach_embedding([own], tmp_path / "cat.safetensors", None)


@pytest.mark.parametrize("name", ["learned_embeds.bin", "learned_embeds-steps-500.safetensors"])
def test_names_that_scripts_give_are_none(name: str, tmp_path: Path) -> None:
    data = {"<thing>": rows(1)[0]}
    torch.save(data, tmp_path / name) if name.endswith("bin") else save_file(data, tmp_path / name)
    assert attach_embedding([tower()], tmp_path / name, None) == ["<thing>"]


def forms() -> dict[str, Any]:
    first = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"x": rows(3)})}
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": nn.Parameter(rows(3))}, "name": "old", "step": 9}
    return {
        "a1111": a1111,
        "first": first,
        "bare": rows(3),
        "half": {"x": rows(3).half().float()},
        "towers": {"clip_l": rows(3)},
        "handler": {"text_encoders_0": rows(3)},
    }


@pytest.mark.parametrize("form", ["a1111", "first", "bare", "half", "towers", "handler"])
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_pickled_forms(form: str, suffix: str, tmp_path: Path) -> None:
    torch.save(forms()[form], tmp_path / f"ti{suffix}")
    found = read_embeddings(tmp_path / f"ti{suffix}")
    name = {"a1111": "old", "half": "x"}.get(form, "ti")
    assert list(found) == [name]
    assert torch.allclose(found[name][0], rows(3), atol=2e-3 if form == "half" else 0)


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_two_towers(names: tuple[str, str], tmp_path: Path) -> None:
    one, two = tower(), tower(32)
    save_file({names[1]: rows(2, 32), names[0]: rows(2)}, tmp_path / "xl.safetensors")
    assert attach_embedding([one, two], tmp_path / "xl.safetensors", None) == ["xl"]
    assert says(one, "xl", rows(2))
    assert says(two, "xl", rows(2, 32))
    with pytest.raises(ValueError, match="for 2 text towers, the model has 1"):
        attach_embedding([tower()], tmp_path / "xl.safetensors", None)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"emb_params": torch.ones(2, 1024)}, r"width 1024 \(SD 2.x\), the text tower 16"),
        ({"emb_params": torch.ones(2, 16), "clip_l_out": torch.ones(2, 16)}, "'clip_l_out' beside"),
        ({"t5xxl": torch.ones(2, 16)}, "'t5xxl' is no embedding of a text tower here"),
        ({"lora_unet_x.alpha": torch.ones(1)}, "'lora_unet_x.alpha' is no embedding"),
        ({"x": torch.ones(2, 3, 4)}, r"expected vectors, got \[2, 3, 4\]"),
        ({"x": torch.tensor([[1.0, torch.inf]])}, "NaN or infinity"),
    ],
)
def test_what_is_none_is_refused(data: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    save_file(data, tmp_path / "neg.safetensors")
    with pytest.raises(ValueError, match=words) as error:
        attach_embedding([tower()], tmp_path / "neg.safetensors", None)
    assert "neg" in str(error.value) or "'x'" in str(error.value)


def test_runs_and_folders(tmp_path: Path) -> None:
    export = tmp_path / "run" / "export"
    (export / "a1111").mkdir(parents=True)
    save_file({"clip_l": rows(1)}, export / "a1111" / "thing.safetensors", metadata={"name": "<thing>"})
    assert list(read_embeddings(tmp_path / "run")) == ["<thing>"]
    save_file({"<other>": rows(1)}, export / "learned_embeds.safetensors")
    assert list(read_embeddings(tmp_path / "run")) == ["<other>"]
    assert attach_embedding([tower()], tmp_path / "run", None) == ["<other>"]
    (tmp_path / "early" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="not exported yet"):
        read_embeddings(tmp_path / "early")


def test_the_command_line_says_what_calls_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my style.safetensors"
    save_file({"<sty>": rows(1, 192)}, path)
    options = ["--steps", "1", "--out", str(tmp_path / "out")]
    assert sample(["a my style apple", "--embedding", str(path), *options]) == 0
    assert f"embedding {path}: called by '<sty>' or 'my style'" in capsys.readouterr().err
