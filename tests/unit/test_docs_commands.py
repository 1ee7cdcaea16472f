"""Every command that a page shows: its words are what its parser takes, its config is there and takes the overrides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import bench.__main__ as benches
from bench.gpu.__main__ import main as gpu
from bench.quality.__main__ import main as quality
from docs.make.verbs import parser_of
from launch.__main__ import _split
from launch.options import Parser
from ldm.cli.__main__ import VERBS
from ldm.cli.options import is_override
from ldm.config.schema import load_run
from tests.documents import PRESENT, ROOT, commands, unmarked

OTHERS = {"apptainer", "mkdir", "sbatch", "scancel", "squeue", "srun", "tail", "torchrun"}
"""Programs of others; what stands behind them is looked at where it is ours."""
ENDS = {"|", ">", ">>", "&&", ";"}


def fault(words: list[str]) -> str | None:
    """What is wrong with a command, None where nothing is; a SystemExit of a parser is a fault too."""
    for at, word in enumerate(words):
        if word in ENDS:
            rest = words[at + 1 :] if word in ("&&", ";") else []
            return fault(words[:at]) or (fault(rest) if rest else None)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    try:
        return _fault(words)
    except SystemExit as stop:
        return None if stop.code in (0, None) else "its parser refuses it"
    except ValueError as error:
        return str(error)


def _fault(words: list[str]) -> str | None:
    head = words[0].rsplit("/", 1)[-1]
    if head == "ldm":
        return _ldm(words[1:])
    if head in ("python", "python3") and words[1:2] == ["-m"]:
        return _module(words[2], words[3:])
    if head in ("python", "python3"):
        return None if words[1] == "-c" or (ROOT / words[1]).is_file() else f"no file {words[1]}"
    if head == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        gone = [w for w in words[1:] if "=" not in w and w not in targets]
        return f"no target {gone}" if gone else None
    if head == "pip":
        extras = {e for w in words for e in re.findall(r"\[([\w,]+)\]", w)}
        known = re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        gone = [e for found in extras for e in found.split(",") if e not in known]
        return f"no extra {gone}" if gone else None
    if head in OTHERS:
        ours = [i for i, w in enumerate(words) if i and w in ("ldm", "ldm.cli")]
        return _ldm(words[ours[0] + 1 :]) if ours else None
    return f"no test knows the program {head}"


def _module(name: str, rest: list[str]) -> str | None:
    if name == "ldm.cli":
        return _ldm(rest)
    if name == "launch":
        own, command = _split(rest)
        found, more = parser_of("launch").parse_known_args(own)
        if more:
            return f"{more[0]} is not an option of launch"
        return fault(command) if command else None if found.verb == "logs" else "no command behind --"
    if name == "bench" or name.startswith("bench."):
        return _bench(name, rest)
    if name == "pytest":
        gone = [w for w in rest if "/" in w and not (ROOT / w).exists()]
        return f"no file {gone}" if gone else None
    return None if name == "mkdocs" else f"no test knows the module {name}"


def _bench(name: str, rest: list[str]) -> str | None:
    """Parsed by the real parsers, which say what is wrong and then are stopped."""
    entry = gpu if name == "bench.gpu" else quality if "quality" in rest else benches._main
    words = [w for w in rest if w != "quality"] if entry is quality else rest
    if (
        entry is benches._main
        and "quality" not in rest
        and (gone := [w for w in rest if w.isalpha() and w not in benches.NAMES])
    ):
        return f"no measurement {gone}"
    parsed = Parser.parse_args

    def stopped(self: Any, args: Any = None, namespace: Any = None) -> Any:
        parsed(self, args, namespace)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_args", stopped)
        entry(words)
    return "it has no parser"


def _ldm(words: list[str]) -> str | None:
    if words[0].startswith("-"):
        return None
    if words[0] not in VERBS:
        return f"no verb {words[0]}"
    if words[-1] == "...":  # the rest is left out; tests/unit/test_docs.py knows the options that are there
        return None
    parser = parser_of(words[0])
    gone = [w for w in words if re.match(r"(?:configs|examples|launch)/", w) and not (ROOT / w).exists()]
    if gone:
        return f"no file {gone}"
    if any(a.dest == "overrides" and not a.option_strings for a in parser._actions):
        found = parser.parse_words(words[1:])
        config = str(vars(found).get("config") or "")
        if config.startswith("configs/"):
            load_run(ROOT / config, found.overrides)
        return None
    _, more = parser.parse_known_args(words[1:])
    odd = [w for w in more if not is_override(w)]
    return f"{odd} are words too many" if odd else None


@pytest.mark.parametrize("page", PRESENT, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_understood(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    faults = {str(c): why for c in commands(page) if (why := fault(c.words)) is not None}
    assert faults == {}, capsys.readouterr().err


@pytest.mark.parametrize("page", PRESENT, ids=lambda p: str(p.relative_to(ROOT)))
def test_marks_stand_before_fences_and_have_a_reason(page: Path) -> None:
    assert unmarked(page) == []
    assert [str(c) for c in commands(page) if c.why is not None and len(c.why) < 8] == []


def test_tests_that_reasons_name_exist() -> None:
    reasons = {c.why for page in PRESENT for c in commands(page) if c.why}
    named = {path for why in reasons for path in re.findall(r"(?:tests|jobs)/[\w/.]*\w", why)}
    gone = [p for p in named if not (ROOT / p).exists() and not (ROOT / "docs" / p).exists()]
    assert gone == []


def test_faults_are_found() -> None:
    """The reading above, on commands whose faults are known; each with its like that is right."""
    for right, wrong in (
        ("ldm sample a --steps 4", "ldm sample a --stepz 4"),
        ("ldm sample a --steps 4", "ldm sample a --steps four"),
        (
            "ldm train configs/train/clip_emoji.yaml train.steps=3",
            "ldm train configs/train/clip_emoji.yaml train.stepz=3",
        ),
        ("ldm train configs/train/clip_emoji.yaml", "ldm train configs/train/gone.yaml"),
        ("python -m launch local --procs 2 -- ldm show run X", "python -m launch local --procs 2 -- ldm show gone X"),
        (
            "python -m launch slurm --nodes 2 -- ldm train CONFIG",
            "python -m launch slurm --nodez 2 -- ldm train CONFIG",
        ),
        ("python -m bench memory --quick", "python -m bench memories"),
        ("python -m bench quality --list", "python -m bench quality --lists"),
        ("make bench", "make benches"),
        ("pip install 'ldm[web]'", "pip install 'ldm[webs]'"),
        ("X=1 ldm doctor --quick | tail -f x", "X=1 ldm doctor --quicker | tail -f x"),
        ("mkdir -p x && sbatch x", "mkdir -p x && rm x"),
        ("srun ldm doctor", "srun ldm docto"),
    ):
        for line, expected in ((right, False), (wrong, True)):
            (command,) = commands(ROOT / "x.md", f"```sh\n{line}\n```\n")
            assert (fault(command.words) is not None) is expected, line


def test_fences_are_read_as_meant() -> None:
    text = (
        "```sh\nldm sample a   # comment\nldm sample b \\\n    --steps 2\n```\n\n"
        "<!-- not run: it takes hours -->\n```sh\nldm demo\n```\n"
        "<!-- not run, but for 2: the first needs weights -->\n```sh\nldm sample c\nldm sample d ...\n```\n"
        "```python\nldm = 1\n```\n```\nldm serve\n```\n```\nldm train: a message\n```\n"
    )
    found = [(c.line, c.words[1:], c.why) for c in commands(ROOT / "x.md", text)]
    assert found == [
        (2, ["sample", "a"], None),
        (3, ["sample", "b", "--steps", "2"], None),
        (9, ["demo"], "it takes hours"),
        (13, ["sample", "c"], "the first needs weights"),
        (14, ["sample", "d", "..."], None),
        (20, ["serve"], None),
    ]
