"""Files of weights as people have them: other types, other containers, damaged, misnamed, with a trainer's objects."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint import weights
from ldm.checkpoint.pickled import Inert
from ldm.cli.__main__ import main


def test_what_a_file_is_instead_is_said(tmp_path: Path) -> None:
    save_file({"a": torch.ones(40)}, tmp_path / "ok.safetensors")
    data = (tmp_path / "ok.safetensors").read_bytes()
    for name, content, words in (
        ("empty", b"", r"it is empty \(0 bytes\)"),
        ("blank", b"\n\n", r"it is empty \(2 bytes\)"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", "git-LFS pointer"),
        ("page", b"<!DOCTYPE html><html>log in</html>", r"a web page \(HTML\)"),
        ("cut", data[:-9], rf"it ends after {len(data) - 9} of {len(data)} bytes"),
        ("header", data[:30], "it ends after 30 bytes, within its header"),
        ("tail", data + b"12345", "5 bytes stand behind its last tensor"),
        ("noise", bytes(range(256)), "not a whole safetensors file"),
        ("short", data[:5], "not a whole safetensors file"),
    ):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{name}\.safetensors: not a whole safetensors file: .*{words}|{words}"
        ) as e:
            weights.open_file(path)
        assert "\n" not in str(e.value)
        assert name in str(e.value)
    for name, content, words in (
        ("page.ckpt", b"<!DOCTYPE html>", "a web page"),
        ("empty.pt", b"", "it is empty"),
        ("text.bin", b"nothing at all", "text.bin"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.*{words}|{words}"):
            weights.open_file(tmp_path / name)


@pytest.mark.parametrize("name", ["page", "empty", "pointer", "short"])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_damaged_model_is_one_line(
    name: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"page": b"<html>", "empty": b"", "pointer": b"version https://git-lfs", "short": b"12345"}[name]
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(content)
    assert main(["sample", "x", "--model", str(path), "--out", str(tmp_path / "out")]) == 2
    assert main(["sample", "x", "--lora", str(path), "--out", str(tmp_path / "out")]) == 2
    assert main(["sample", "x", "--embedding", str(path), "--out", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if str(path) in line]
    assert len(lines) == 3


def test_folders_of_before_safetensors(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert set(weights.open_folder(tmp_path, "model")) == {"a"}
    torch.save({"model.b": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.bin")
    assert set(weights.open_folder(tmp_path, "diffusion_pytorch_model")) == {"b"}
    with pytest.raises(ValueError, match=r"no other\.safetensors; it holds diffusion_pytorch_model\.bin"):
        weights.open_folder(tmp_path, "other")


def test_a_file_is_what_it_holds_not_what_it_is_called(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").rename(tmp_path / "x.ckpt")
    torch.save({"state_dict": {"a": torch.arange(3.0)}}, tmp_path / "y.SAFETENSORS")
    for name in ("x.ckpt", "y.SAFETENSORS"):
        assert weights.open_file(tmp_path / name)["a"].read().tolist() == [0, 1, 2]


def test_a_header_of_any_length_is_no_pickle(tmp_path: Path) -> None:
    """Its length's low byte may be 0x80, as the first of a pickle is."""
    for pad in range(0, 264, 8):
        notes = {"format": "pt", "note": "x" * pad}
        save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata=notes)
        assert weights.metadata(tmp_path / "x.safetensors") == notes
        assert set(weights.open_file(tmp_path / "x.safetensors")) == {"a"}


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_small_floats_are_read_as_they_are(kind: torch.dtype, tmp_path: Path) -> None:
    values = torch.linspace(-2, 2, 33).to(kind)
    save_file({"a": values}, tmp_path / "x.safetensors")
    source = weights.open_file(tmp_path / "x.safetensors")
    assert torch.equal(weights.read_all(source, torch.float32)["a"], values.float())
    weights.write_file(tmp_path / "y.safetensors", source)
    assert weights.open_file(tmp_path / "y.safetensors")["a"].dtype == kind


def test_scaled_eighth_precision(tmp_path: Path) -> None:
    """ComfyUI's files: a marker, and a factor for each weight."""
    values = torch.linspace(-2, 2, 8).to(torch.float8_e4m3fn).view(2, 4)
    parts = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn), "l.weight": values, "l.bias": torch.ones(2)}
    save_file(
        parts | {"l.scale_weight": torch.tensor(3.0), "l.scale_input": torch.tensor(1.0)}, tmp_path / "x.safetensors"
    )
    found = weights.read_all(weights.open_file(tmp_path / "x.safetensors"))
    assert set(found) == {"l.weight", "l.bias"}
    assert torch.equal(found["l.weight"], 3 * values.float())


def test_what_compiling_and_parallelism_put_before_names(tmp_path: Path) -> None:
    state = {"module._orig_mod.conv.weight": torch.ones(1), "module.mid._orig_mod.bias": torch.ones(1)}
    save_file(state, tmp_path / "x.safetensors")
    assert set(weights.open_file(tmp_path / "x.safetensors")) == {"conv.weight", "mid.bias"}
    save_file({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "y.safetensors")
    assert set(weights.open_file(tmp_path / "y.safetensors")) == {"module.a", "b"}


@pytest.mark.parametrize("nest", ["state_dict", "model", "module", "model_state_dict", "model state_dict"])
def test_tensors_within(nest: str, tmp_path: Path) -> None:
    data: Any = {"a": torch.ones(2)}
    for key in reversed(nest.split()):
        data = {key: data, "epoch": 3, "optimizer_states": [{"state": {}}]}
    torch.save(data, tmp_path / "x.ckpt")
    assert set(weights.open_file(tmp_path / "x.ckpt")) == {"a"}
    torch.save({"epoch": 3}, tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match=r"none\.ckpt: expected named tensors, got the keys \['epoch'\]"):
        weights.open_file(tmp_path / "none.ckpt")


def test_a_trainers_objects_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's checkpoints, SD 1.4's among them, name callbacks by class: they are not imported, nor refused."""
    import sys
    import types

    name = "pytorch_lightning.callbacks.model_checkpoint"
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))

    class ModelCheckpoint:
        def __init__(self) -> None:
            self.best = 1.0

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = name, "ModelCheckpoint"
    vars(sys.modules[name])["ModelCheckpoint"] = ModelCheckpoint
    data = {"state_dict": {"a": torch.ones(2)}, "callbacks": {ModelCheckpoint: {"best": ModelCheckpoint()}}}
    torch.save(data, tmp_path / "x.ckpt")
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.delitem(sys.modules, part)
    assert set(weights.open_file(tmp_path / "x.ckpt")) == {"a"}
    assert name not in sys.modules
    assert Inert(1, a=2).state is None


def test_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    state = {"good": torch.ones(2), "bad": torch.tensor([1.0, torch.nan]), "whole": torch.ones(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"the file: not numbers .* in 1 key\(s\): bad;"):
        weights.read_all(weights.of_state(state), where="the file")
    with pytest.raises(ValueError, match=r"'big' as torch.float16: it does not fit into that type"):
        weights.write_file(
            tmp_path / "x.safetensors", weights.of_state({"big": torch.tensor([1e6])}), dtype=torch.float16
        )


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0")
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        weights.open_file(tmp_path / "x.safetensors")
