"""Files that are something else than what they should be are called what they are, wherever they are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ldm.checkpoint.convert import open_model
from ldm.checkpoint.downloads import instead
from ldm.checkpoint.settings import read_json
from ldm.models.shipped import named

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Log in</title></head></html>"
KINDS = [(POINTER, "git-LFS pointer"), (PAGE, r"web page \(HTML\)"), (b"", "it is empty")]


@pytest.mark.parametrize(("data", "said"), KINDS, ids=["pointer", "page", "empty"])
@pytest.mark.parametrize("part", ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
                                  "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
                                  "text_encoder/model.safetensors", "tokenizer/vocab.json"])  # fmt: skip
def test_parts_of_a_folder(tmp_path: Path, part: str, data: bytes, said: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(named("emoji"), folder)
    (folder / part).write_bytes(data)
    with pytest.raises(ValueError, match=said) as caught:
        open_model(folder).load()
    assert Path(part).name in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(("data", "said"), KINDS, ids=["pointer", "page", "empty"])
def test_an_index_of_shards(tmp_path: Path, data: bytes, said: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(named("emoji"), folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_bytes(data)
    with pytest.raises(ValueError, match=said):
        open_model(folder)


def test_what_is_as_it_should_be(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}')
    assert instead(file) is None
    file.write_text("{")
    with pytest.raises(ValueError, match="not JSON: Expecting"):
        read_json(file)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"ema": True}, "--ema: is for single files"), ({"prediction": "v"}, "--prediction: 'v': is for single files"),
     ({"variant": "fp16"}, "no .*fp16.safetensors")],
)  # fmt: skip
def test_what_says_nothing_of_a_folder_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_model(named("emoji"), **options)  # type: ignore[arg-type]
