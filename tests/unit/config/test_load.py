"""Strict decoding: a table of bad inputs with the exact message, and what good ones become."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from ldm.config import load


@dataclass(frozen=True, kw_only=True)
class Full:
    kind: Literal["full"] = "full"


@dataclass(frozen=True, kw_only=True)
class Lora:
    kind: Literal["lora"] = "lora"
    rank: int = 4

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    steps: int
    out: Path = Path("runs")
    ema: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    widths: tuple[int, ...] = (32, 64)
    size: int | tuple[int, int] = 64
    weights: dict[str, float] = field(default_factory=dict)
    adapter: Full | Lora = field(default_factory=Full)
    optim: Optim = field(default_factory=Optim)
    prior: Optim | None = None


GOOD: dict[str, Any] = {"name": "a", "steps": 10}

BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"optim": {"lrr": 1.0}},
        "config.optim: unknown key(s) ['lrr']; did you mean 'lr'?",
    ),
    (
        {"optim": {"lrr": 1.0, "bettas": [0, 0], "plugh": 3}},
        "config.optim: unknown key(s) ['bettas', 'lrr', 'plugh']; Optim has betas, clip, lr; did you mean 'betas', "
        "'lr'?",
    ),
    (
        {"xyzzy": 1, "plugh": 2},
        "config: unknown key(s) ['plugh', 'xyzzy']; Run has adapter, ema, name, optim, out, precision, prior, size, "
        "steps, weights, widths",
    ),
    (
        {"adapter": {"kind": "lorra"}},
        "config.adapter.kind: 'lorra' is not one of ['full', 'lora']; did you mean 'lora'?",
    ),
    ({"adapter": {"rank": 4}}, "config.adapter.kind: missing; one of ['full', 'lora']"),
    ({"adapter": {"kind": "full", "rank": 4}}, "config.adapter: unknown key(s) ['rank']; Full has kind"),
    ({"adapter": {"kind": "lora", "rank": 0}}, "config.adapter: rank must be at least 1, got 0"),
    ({"adapter": {"kind": "lora", "rank": 4.0}}, "config.adapter.rank: expected int, got 4.0 (float)"),
    ({"name": True}, "config.name: expected str, got True (bool); quote it in YAML?"),
    ({"name": 12}, "config.name: expected str, got 12 (int); quote it in YAML?"),
    ({"name": None}, "config.name: expected str, got None (NoneType)"),
    ({"steps": "10"}, "config.steps: expected int, got '10' (str)"),
    ({"steps": True}, "config.steps: expected int, got True (bool)"),
    ({"ema": 1}, "config.ema: expected bool, got 1 (int)"),
    ({"ema": "yes"}, "config.ema: expected bool, got 'yes' (str)"),
    ({"out": 3}, "config.out: expected path, got 3 (int); quote it in YAML?"),
    ({"precision": "fp64"}, "config.precision: 'fp64' is not one of ['fp32', 'bf16']"),
    ({"optim": {"lr": "1e-4"}}, "config.optim.lr: expected float, got '1e-4' (str)"),
    ({"optim": {"lr": True}}, "config.optim.lr: expected float, got True (bool)"),
    ({"optim": {"lr": None}}, "config.optim.lr: expected float, got None (NoneType)"),
    ({"optim": {"betas": [0.9]}}, "config.optim.betas: expected 2 values, got 1: [0.9]"),
    ({"optim": {"betas": 0.9}}, "config.optim.betas: expected a list, got 0.9"),
    ({"optim": {"clip": "none"}}, "config.optim.clip: expected float, got 'none' (str)"),
    ({"optim": [1]}, "config.optim: expected the keys of Optim, got [1]"),
    ({"widths": [32, "64"]}, "config.widths[1]: expected int, got '64' (str)"),
    ({"widths": "32"}, "config.widths: expected a list, got '32'"),
    ({"weights": {"a": "b"}}, "config.weights.a: expected float, got 'b' (str)"),
    ({"weights": [1.0]}, "config.weights: expected keys and values, got [1.0]"),
    ({"size": "64"}, "config.size: expected int, got '64' (str); or config.size: expected a list, got '64'"),
    ({"prior": {"lr": 1.0, "x": 2}}, "config.prior: unknown key(s) ['x']; Optim has betas, clip, lr"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(change) for change, _ in BAD])
def test_bad_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load.decode(Run, GOOD | change)
    assert str(error.value) == message


def test_missing_keys_are_named() -> None:
    with pytest.raises(ValueError, match=r"^config: missing key\(s\) \['name', 'steps'\] of Run$"):
        load.decode(Run, {})
    with pytest.raises(ValueError, match=r"^config: expected the keys of Run, got None$"):
        load.decode(Run, None)


def test_good_values() -> None:
    data = GOOD | {
        "out": "runs/a",
        "size": [64, 96],
        "adapter": {"kind": "lora", "rank": 8},
        "optim": {"lr": 1, "clip": None},
        "weights": {"kl": 1},
    }
    run = load.decode(Run, data)
    assert run == Run(
        name="a",
        steps=10,
        out=Path("runs/a"),
        size=(64, 96),
        adapter=Lora(rank=8),
        optim=Optim(lr=1.0, clip=None),
        weights={"kl": 1.0},
    )
    assert type(run.optim.lr) is float


def test_encode_is_the_inverse() -> None:
    run = Run(name="a", steps=3, adapter=Lora(rank=2), prior=Optim(clip=None), weights={"x": 0.5}, size=(8, 8))
    assert load.decode(Run, load.encode(run)) == run


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_dump_survives_the_file(tmp_path: Path) -> None:
    run = Run(name="010", steps=3, adapter=Lora(rank=2), out=Path("runs/yes"))
    assert load.load(Run, write(tmp_path, "run.yaml", load.dump(run))) == run


def test_a_choice_of_another_kind_keeps_nothing_of_the_base(tmp_path: Path) -> None:
    write(tmp_path, "below.yaml", "a: {m: {kind: x, only_x: 1, both: 2}, n: {kind: x, kept: 3}}")
    path = write(tmp_path, "over.yaml", "base: below.yaml\na: {m: {kind: y, only_y: 4}, n: {kind: x, more: 5}}")
    wanted = {"a": {"m": {"kind": "y", "only_y": 4}, "n": {"kind": "x", "kept": 3, "more": 5}}}
    assert load.read(path) == wanted


def test_base_files_interpolation_and_overrides(tmp_path: Path) -> None:
    write(tmp_path, "base/lowest.yaml", "optim: {lr: 1.0e-3, clip: 2.0}\nwidths: [1, 2, 3]")
    write(tmp_path, "base/one.yaml", "base: lowest.yaml\nsteps: 5\noptim: {lr: 2.0e-3}")
    write(tmp_path, "base/two.yaml", "widths: [7]\nsteps: 6")
    path = write(tmp_path, "run.yaml", "base: [base/one.yaml, base/two.yaml]\nname: cat\nout: runs/${name}")
    run = load.load(Run, path, ["optim.clip=0.5", "adapter.kind=lora", "adapter.rank=3"])
    assert run == Run(
        name="cat", steps=6, out=Path("runs/cat"), widths=(7,), optim=Optim(lr=2e-3, clip=0.5), adapter=Lora(rank=3)
    )
    assert load.load(Run, path, ["name=dog", "optim.lr=1e-5", "prior=null"]).out == Path("runs/dog")
    assert load.load(Run, path, ["optim.lr=1e-5"]).optim.lr == 1e-5


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("name: [", [], "config '{path}': not readable as YAML: "),
        ("- 1\n- 2", [], "config '{path}': expected keys and values at the top, got ListConfig"),
        ("name: a", ["steps"], "override 'steps': expected key=value, such as train.optim.lr=1e-4"),
        ("name: a", ["--steps=3"], "override '--steps=3': expected key=value, such as train.optim.lr=1e-4"),
        ("name: a", ["=3"], "override '=3': expected key=value, such as train.optim.lr=1e-4"),
        ("name: ${nowhere}", [], "{path}: Interpolation key 'nowhere' not found"),
        ("base: gone.yaml", [], "config '{folder}/gone.yaml': no such file"),
        ("base: run.yaml", [], "config '{path}': `base:` may be nested at most two levels deep"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    path = write(tmp_path, "run.yaml", text)
    with pytest.raises(ValueError) as error:
        load.read(path, overrides)
    assert str(error.value).startswith(message.format(path=path, folder=tmp_path))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^config '.*none\.yaml': no such file$"):
        load.read(tmp_path / "none.yaml")


def test_a_config_cannot_run_code(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", f"name: !!python/object/apply:os.system ['touch {tmp_path}/hit']\nsteps: 1")
    with pytest.raises(ValueError, match="not readable as YAML"):
        load.read(path)
    assert not (tmp_path / "hit").exists()
