"""Users' mistakes end in one line that names what is wrong and what is allowed, with exit code 2 and no traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm.cli.__main__ import main
from tests import miniature


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def model(root: Path) -> Path:
    """A model folder with random weights."""
    from ldm.checkpoint.convert import save_diffusers
    from ldm.models.unet import UNet, UNetConfig
    from ldm.recipes.sources import load_autoencoder, load_towers

    unet = UNet(UNetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in miniature.UNET.items()}))
    vae, text = load_autoencoder(str(root / "autoencoder")), load_towers(str(root / "towers"))
    scheduler = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler |= {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False}
    save_diffusers(root / "model", network=unet, autoencoder=vae, text=text, scheduler=scheduler)
    return root / "model"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Any:
    """fails(argv) -> the one line on standard error of a command that ends with exit code 2."""

    def run(*argv: str) -> str:
        capsys.readouterr()
        assert main([*map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert err.count("\n") == 1
        assert err.startswith("ldm")
        return err

    return run


@pytest.fixture
def config(root: Path, tmp_path: Path) -> str:
    return str(miniature.write(miniature.text_to_image(root), tmp_path / "config.yaml"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.optim.warmpu=5", ["train.optim", "warmpu", "did you mean 'warmup'"]),
        ("task.network.layer_per_block=2", ["task.network", "did you mean 'layers_per_block'"]),
        ("train.steps=many", ["train.steps", "expected int", "'many'"]),
        ("train.steps=1.5", ["train.steps", "expected int", "1.5"]),
        ("train.steps=0", ["train", "steps must be at least 1", "0"]),
        ("train.ema.decay=1.5", ["train.ema", "decay", "1.5"]),
        ("train.batch=5", []),
        ("task.kind=text2image", ["task.kind", "text2image", "text_to_image"]),
        ("train.engine.zero_stage=4", ["zero_stage: 4", "[0, 1, 2, 3]"]),
        ("train.engine.precision=fp8", ["precision", "fp8", "bf16"]),
        ("task.samples.settings.sampler=eulr", ["task.samples.settings", "eulr", "euler"]),
        ("task.process.prediction.kind=noise", ["task.process.prediction.kind", "noise", "epsilon"]),
        ("train.steps", ["train.steps", "key=value"]),
        ("task.network.block_out_channels=[8,", ["block_out_channels"]),
        ("out=${nowhere}", ["nowhere"]),
    ],
)
def test_wrong_configs(fails: Any, config: str, override: str, said: list[str], monkeypatch: Any) -> None:
    if override == "train.batch=5":  # right for one process, wrong for two
        monkeypatch.setenv("WORLD_SIZE", "2")
        said = ["train.batch: 5", "2 processes"]
    line = fails("train", config, override, "--dry-run")
    for part in said:
        assert part in line


def test_missing_and_unreadable_config(fails: Any, tmp_path: Path) -> None:
    assert "no such file" in fails("train", tmp_path / "nothing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,\nb: }")
    assert "not readable as YAML" in fails("train", broken)
    broken.write_text("- 1\n- 2\n")
    assert "keys and values" in fails("train", broken)
    broken.write_text("name: x\nout: y\n")
    assert "missing key(s)" in fails("train", broken)


def test_data_that_is_not_a_shard_set(fails: Any, config: str, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    assert "manifest.json" in fails("train", config, f"data.path={tmp_path / 'pictures'}", "--dry-run")
    tar = tmp_path / "00000.tar"
    tar.write_bytes(b"\0" * 1024)
    assert "not a manifest.json" in fails("train", config, f"data.path={tar}", "--dry-run")
    assert "nowhere" in fails("train", config, "data.path=nowhere", "--dry-run")
    line = fails("train", config, "data.split=trian", "--dry-run")
    assert "trian" in line
    assert "train" in line.replace("trian", "")


def test_models_that_are_not_there(fails: Any, config: str) -> None:
    assert "nowhere" in fails("train", config, "task.vae=nowhere", "--dry-run")
    assert "nowhere" in fails("train", config, "task.text=nowhere", "--dry-run")


def test_a_run_folder_that_cannot_be_made(fails: Any, config: str, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    assert "taken" in fails("train", config, f"out={taken}", "train.steps=1")


def test_sample_mistakes(fails: Any, model: Path, tmp_path: Path) -> None:
    here = ("--model", model, "--steps", "1", "--out", tmp_path / "out")
    line = fails("sample", "a red dot", "--sampler", "dpm++", *here)
    assert all(name in line for name in ("dpm++", "ddim", "dpmpp_2m", "euler"))
    line = fails("sample", "a red dot", "--size", "20", *here)
    assert "20 is not a multiple of 8" in line
    assert "guidance" in fails("sample", "x", "--guidance=-1", *here)
    assert "steps" in fails("sample", "x", "--steps", "0", "--model", model)
    assert "no prompt" in fails("sample", *here)
    assert "no such file" in fails("sample", "--from-file", tmp_path / "no.txt", *here)
    assert "nowhere" in fails("sample", "x", "--model", "nowhere")
    assert not (tmp_path / "out").exists()


def test_a_long_prompt_is_said_and_cut_as_clip_cuts(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The picture is that of the prompt whose tokens fit: start, context - 2 tokens, end."""
    fits, more = "red " * 10, "blue " * 10
    pictures = []
    for name, prompt in (("long", fits + more), ("short", fits)):
        argv = ["sample", prompt, "--model", model, "--steps", "2", "--sampler", "ddim", "--out", tmp_path / name]
        assert main([*map(str, argv)]) == 0
        out, err = capsys.readouterr()
        assert ("longer than" in err and "blue" in err) == (name == "long")
        pictures.append(Path(out.splitlines()[0]))
    from PIL import Image

    a, b = (Image.open(p).tobytes() for p in pictures)
    assert a == b


def test_unknown_verb_and_option(fails: Any, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails("trian")
    assert "trian" in line
    assert "train" in line.replace("trian", "")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--no-such-option", "x"])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_is_answered_without_torch() -> None:
    code = (
        "import sys; from ldm.cli.__main__ import main; code = main(['--help']); "
        "assert not {'torch', 'deepspeed', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    from ldm.cli.__main__ import VERBS

    assert all(verb in done.stdout for verb in VERBS)


def test_no_traceback_in_a_process_of_its_own(config: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ldm.cli", "train", config, "train.stesp=3"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "did you mean 'steps'" in done.stderr
    assert "Traceback" not in done.stderr


def test_print_config_shows_everything_and_reads_back(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ldm.config.schema import load_run

    assert main(["train", config, "train.steps=9", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert '"gradient_clipping"' in printed
    again = tmp_path / "printed.yaml"
    again.write_text(printed)
    assert load_run(again) == load_run(config, ["train.steps=9"])


@pytest.mark.parametrize("fault", [errno.EROFS, errno.ENOSPC])
def test_a_disk_that_fails_is_one_line_and_code_74(
    fault: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(fault, os.strerror(fault), str(tmp_path / "file"))

    monkeypatch.setattr("ldm.cli.show.main", refused)
    assert main(["show", "noising"]) == 74
    assert capsys.readouterr().err == f"ldm show: {tmp_path / 'file'}: {os.strerror(fault)}\n"


@pytest.mark.parametrize("name", ["loop", "gone", "file"])
def test_links_to_themselves_and_to_nothing(fails: Any, config: str, tmp_path: Path, name: str) -> None:
    bad = tmp_path / name
    if name == "file":
        bad.write_text("x")
    else:
        bad.symlink_to(bad if name == "loop" else tmp_path / "nothing")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "a.png")
    for argv in (
        ("train", config, f"out={bad}", "train.steps=1"),
        ("train", config, f"data.path={bad}", "--dry-run"),
        ("data", "build", pictures, bad),
        ("data", "index", bad),
        ("data", "inspect", bad),
        ("show", "run", bad),
        ("show", "noising", bad),
        ("export", bad, tmp_path / "out"),
        ("convert", bad, tmp_path / "out", "--to", "diffusers"),
        ("sample", "x", "--model", bad),
        ("plan", config, "--page", bad / "page.html"),
    ):
        line = fails(*argv)
        assert name in line
        assert "Errno" not in line or argv[0] == "show", line
