"""`ldm finetune --from FILE`: what is printed loads and says what became of each key; mistakes are one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm.cli import finetune
from ldm.config.load import encode
from ldm.config.schema import load_run
from ldm.interop.reading import convert
from tests.unit.interop.pictures import folder

ARGUMENTS = """
[model]
pretrained_model_name_or_path = "org/model"
dataset_config = "data.toml"
[network]
network_module = "networks.lora"
network_dim = 8
[training]
output_dir = "out"
output_name = "style"
max_train_epochs = 2
logging_dir = "logs"
"""
DATA = """
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 512
batch_size = 2
  [[datasets.subsets]]
  image_dir = '{place}'
  num_repeats = 3
"""


@pytest.fixture
def arguments(tmp_path: Path) -> Path:
    place = folder(tmp_path / "pictures", 5)
    (tmp_path / "data.toml").write_text(DATA.format(place=place))
    (tmp_path / "args.toml").write_text(ARGUMENTS)
    return tmp_path / "args.toml"


def test_what_is_written_trains(arguments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The data set that the arguments name is found beside them; overrides hold."""
    config = tmp_path / "config.yaml"
    assert finetune.main(["--from", str(arguments), "--write", str(config), "train.optim.lr=3e-4", "seed=7"]) == 0
    run = load_run(config)
    assert (run.train.steps, run.train.batch, run.train.optim.lr, run.seed) == (2 * 8, 2, 3e-4, 7)
    assert run.task.images == tmp_path / "pictures"  # type: ignore[union-attr]
    text = config.read_text()
    assert "# network_dim" in text
    assert f"#   ldm train {config}" in text
    assert "left out" in next(line for line in text.splitlines() if "logging_dir" in line)
    told = capsys.readouterr()
    assert told.out == ""
    assert f"ldm train {config}" in told.err
    with pytest.raises(ValueError, match="is there already"):
        finetune.main(["--from", str(arguments), "--write", str(config)])


def test_what_is_printed_is_the_same(arguments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.main([f"--from={arguments}"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_run(printed).train.steps == 16


def test_all_that_cannot_be_honoured_is_one_message(arguments: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments.write_text(ARGUMENTS + 'optimizer_type = "DAdaptAdam"\nzero_terminal_snr = true\n')
    wanted = (r"args\.toml \(kohya's sd-scripts\): 2 settings change the result and cannot be honoured: "
              r"optimizer_type=DAdaptAdam: .*; zero_terminal_snr=true: .*--lenient leaves them out")  # fmt: skip
    with pytest.raises(ValueError, match=wanted):
        finetune.main(["--from", str(arguments)])
    assert finetune.main(["--from", str(arguments), "--lenient"]) == 0
    told = capsys.readouterr()
    assert "2 refused and left out" in told.err
    row = next(line for line in told.out.splitlines() if "optimizer_type" in line)
    assert "refused" in row


def test_two_files_and_other_pictures(arguments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder(tmp_path / "other", 3)
    loose = tmp_path / "loose.toml"
    loose.write_text(ARGUMENTS.replace('dataset_config = "data.toml"', ""))
    assert finetune.main(["--from", str(loose), "--from", str(tmp_path / "data.toml")]) == 0
    assert "steps: 16" in capsys.readouterr().out
    assert finetune.main(["--from", str(loose), "--images", str(other), "--base", "emoji", "train.batch=1"]) == 0
    out = capsys.readouterr().out
    assert f"images: {other}" in out
    assert "base: emoji" in out


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "x = ", "no TOML"),
        ("a.yaml", "name: x\n", "a YAML without the `job` of ai-toolkit's"),
        ("a.py", "print(1)\n", "a program, not settings"),
        ("a.sh", "echo hello\n", "no call of a training script"),
        ("a.json", "3", "neither keys and values nor a list of options"),
    ],
)
def test_files_that_are_none_of_these(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        finetune.main(["--from", str(tmp_path / name)])


def test_a_mistake_of_ours_is_named_as_ours(arguments: Path) -> None:
    with pytest.raises(ValueError, match=r"args\.toml, as a config of ours: .*stepz"):
        finetune.main(["--from", str(arguments), "train.stepz=3"])
    with pytest.raises(ValueError, match="no such file"):
        finetune.main(["--from", "gone.toml"])


def test_every_key_of_ours_that_the_table_names_is_one(arguments: Path) -> None:
    """The table's third column, looked up in the resolved config."""
    converted = convert([arguments])
    resolved = encode(load_run(converted.tree))
    for row in converted.rows:
        tree = resolved
        for name in row.ours.split(".") if row.ours else ():
            assert name in tree, row
            tree = tree[name]
