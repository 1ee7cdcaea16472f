"""Overrides as people type them, YAML as people write it, and where in a file a mistake stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from ldm.config import load


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-4
    warmup: int = 0


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = 10
    optim: Optim = field(default_factory=Optim)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str = "a"
    out: Path = Path("runs")
    cache: Path | None = None
    ema: bool = True
    compile: Literal["off", "on", "inductor"] = "inductor"
    prompts: tuple[str, ...] = ()
    train: Train = field(default_factory=Train)
    batch: int = 4


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("name: cat\n")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "Run #2", "a {} of set #1", "2024-01-01", "007", "no", "on", "1e5", "12:00:00", "1_000", "v: 2", "- x", "@home",
        "%5", "`x`", "it's", '"half', "[a", "{a", "*all", "&b c", "!not", "a\tb", " x ", "x\\y", "$HOME", "ümläut 猫",
        "a = b", "a: b: c", "? why", "> folded", "| x", "null value", "3.10",
    ],
)  # fmt: skip
def test_words_are_taken_whole(file: Path, text: str) -> None:
    assert load.load(Run, file, [f"name={text}"]).name == text
    if text != " x ":
        assert load.load(Run, file, [f"out=/tmp dir/{text}"]).out == Path(f"/tmp dir/{text}")


def test_quoted_words_and_nothing(file: Path) -> None:
    assert load.load(Run, file, ["name='007'"]).name == "007"
    assert load.load(Run, file, ['name="a # b"']).name == "a # b"
    assert load.load(Run, file, ["name="]).name == ""
    assert load.load(Run, file, ["cache=x", "cache=null"]).cache is None
    for wrong in ("out=", "cache="):
        with pytest.raises(ValueError, match=r"expected path, got ''"):
            load.load(Run, file, [wrong])


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=1e4", "steps", 10_000),
        ("train.steps=1_000", "steps", 1000),
        ("train.steps=1.5e3", "steps", 1500),
        ("train.steps=0x10", "steps", 16),
    ],
)
def test_whole_numbers(file: Path, override: str, key: str, value: int) -> None:
    found = load.load(Run, file, [override]).train.steps
    assert found == value
    assert type(found) is int


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=12:00:00", r"config.train.steps: expected int, got '12:00:00' \(str\)"),
        ("train.steps=010", r"config.train.steps: expected int, got '010' \(str\)"),
        ("train.steps=yes", r"config.train.steps: expected int, got True \(bool\)"),
        ("train.steps=1.5", r"config.train.steps: expected int, got 1.5 \(float\)"),
        ("train.steps=100.0", r"config.train.steps: expected int, got 100.0 \(float\)"),
        ("train.steps=1,000", r"config.train.steps: expected int, got '1,000' \(str\)"),
        ("train.steps=100 # hundred", r"config.train.steps: expected int, got '100 # hundred' \(str\)"),
        ("train.optim.lr=.nan", "config.train.optim.lr: expected a finite number, got nan"),
        ("train.optim.lr=.inf", "config.train.optim.lr: expected a finite number, got inf"),
        ("train.optim.lr=1e999", "config.train.optim.lr: expected a finite number, got inf"),
        ("train.optim.lr=nan", r"config.train.optim.lr: expected float, got 'nan' \(str\)"),
        ("prompts=[a red dot #1]", r"config.prompts: expected a list, got '\[a red dot #1\]' \(not readable as YAML"),
        ("prompts=[a, b] # two", r"override .*: '# two' begins a comment in YAML; quote what it belongs to"),
        ("train={steps: 1, steps: 2}", r"override .*: the key 'steps' is given a second time"),
        ("steps", r"override 'steps': expected key=value, such as train.optim.lr=1e-4"),
    ],
)
def test_what_is_no_number_is_refused_by_name(file: Path, override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load.load(Run, file, [override])


def test_parts_of_lists_and_what_is_no_key(file: Path) -> None:
    file.write_text("prompts: [a, b]\ntrain: {optim: {warmup: 3}}\n")
    assert load.load(Run, file, ["prompts[1]=c #1"]).prompts == ("a", "c #1")
    assert load.load(Run, file, ["train.optim={lr: 2}"]).train.optim == Optim(lr=2.0, warmup=3)
    for wrong in (
        "prompts[9]=x",
        "train.steps.x=3",
        "a..b=1",
        "a[=1",
        "[0]=x",
        "train=3",
        ".a=1",
        "train=[1]",
        "name=${",
    ):
        with pytest.raises(ValueError) as error:
            load.load(Run, file, [wrong])
        assert "\n" not in str(error.value)


def test_yes_and_no_where_they_are_meant(file: Path) -> None:
    assert load.load(Run, file, ["ema=no"]).ema is False
    assert load.load(Run, file, ["ema=yes"]).ema is True
    assert load.load(Run, file, ["compile=off"]).compile == "off"  # a word of the choice, not YAML's false
    file.write_text("compile: on\n")
    assert load.load(Run, file).compile == "on"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\ntrain:\n  steps: 0\n", "config.train: steps must be at least 1, got 0 ({f}, line 3, column 10)"),
        (
            "name: a\nname: b\n",
            "config '{f}': line 2, column 1: the key 'name' is given a second time, first on line 1",
        ),
        (
            "train:\n  steps: 1\n  optim: {lr: 1}\n  steps: 2\n",
            "config '{f}': line 4, column 3: the key 'steps' is given",
        ),
        ("train:\n\tsteps: 1\n", "config '{f}': not readable as YAML: line 2, column 1: found character '\\t'"),
        ("name: a: b\n", "config '{f}': not readable as YAML: line 1, column 8: mapping values are not allowed here"),
        ("train:\n  optim:\n    lrr: 1\n", "config.train.optim: unknown key(s) ['lrr']"),
        ("name: 010\n", "config.name: expected str"),
        ("name: 12\n", "config.name: expected str, got 12 (int); quote it in YAML? ({f}, line 1, column 7)"),
        (
            "prompts: [a, 3]\n",
            "config.prompts[1]: expected str, got 3 (int); quote it in YAML? ({f}, line 1, column 14)",
        ),
    ],
)
def test_mistakes_in_a_file_have_their_place(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    if "010" in text:  # eight, as YAML 1.1 has it, is nobody's meaning
        assert load.load(Run, file).name == "010"
        return
    with pytest.raises(ValueError) as error:
        load.load(Run, file)
    assert str(error.value).startswith(said.format(f=file))
    assert "\n" not in str(error.value)
    if "lrr" in text:
        assert str(error.value).endswith(f"did you mean 'lr'? ({file}, line 3, column 10)")


def test_a_base_has_the_place_in_its_own_file(file: Path) -> None:
    (file.parent / "below.yaml").write_text("train:\n  steps: many\n")
    file.write_text("base: below.yaml\nname: b\n")
    with pytest.raises(
        ValueError, match=r"config.train.steps: expected int, got 'many' \(str\) \(.*below.yaml, line 2, column 10\)"
    ):
        load.load(Run, file)


def test_texts_of_other_programs(file: Path) -> None:
    for data in ("\ufeffname: ü\n".encode(), "name: ü\r\n".encode(), "name: ü\n".encode("utf-16")):
        file.write_bytes(data)
        assert load.load(Run, file).name == "ü"
    file.write_bytes("name: ü\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not text in UTF-8: byte 6 is 0xfc"):
        load.load(Run, file)


def test_the_home_folder_is_meant_wherever_a_path_is(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file.write_text("out: ~/runs/one\nname: ~/a name\nprompts: [~/x]\n")
    found = load.load(Run, Path("~/run.yaml"))
    assert (found.out, found.name, found.prompts) == (tmp_path / "runs/one", f"{tmp_path}/a name", (f"{tmp_path}/x",))
    assert load.load(Run, file, ["out=~/runs/two"]).out == tmp_path / "runs/two"
    assert load.load(Run, file, ["out=~"]).out == tmp_path
    assert load.load(Run, file, ["out=~nobody at all/x"]).out == Path("~nobody at all/x")
    assert load.load(Run, file, ["name=~x"]).name == "~x"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("lr=1", "train.optim.lr"),
        ("learning_rate=1", "train.optim.lr"),
        ("train.lr=1", "train.optim.lr"),
        ("train.learning-rate=1", "train.optim.lr"),
        ("warmup=1", "train.optim.warmup"),
        ("max_train_steps=3", "train.steps"),
        ("train.stesp=3", "steps"),
        ("bacth=3", "batch"),
    ],
)
def test_a_key_is_found_in_the_whole_tree(file: Path, override: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"did you mean '{hint}'\?$"):
        load.load(Run, file, [override])


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "self.yaml").symlink_to(tmp_path / "self.yaml")
    (tmp_path / "gone.yaml").symlink_to(tmp_path / "nothing.yaml")
    (tmp_path / "train.yaml").write_text("name: a\n")
    for name, said in (
        ("self", "link to nothing, or to itself"),
        ("gone", "link to nothing"),
        ("trian", "did you mean 'train.yaml'"),
    ):
        with pytest.raises(ValueError, match=said):
            load.read(tmp_path / f"{name}.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        load.read(tmp_path)


def test_plain_data_instead_of_a_file() -> None:
    tree: dict[str, Any] = {"name": "x", "train": {"steps": 3}}
    assert load.load(Run, tree, ["train.steps=4"]) == Run(name="x", train=Train(steps=4))
