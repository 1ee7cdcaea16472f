"""The set-up: `constraints.txt` is what is installed, within pyproject's ranges; parts of the suite are summed up."""

from __future__ import annotations

import os
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import __main__ as suite

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
NOT_OURS = {"ldm", "pip", "setuptools", "wheel"}


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned(python: str) -> dict[str, str]:
    """Versions that hold for one Python on Linux, such as 3.12.5."""
    environment = {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "sys_platform": "linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    holding = [r for r in constraints() if r.marker is None or r.marker.evaluate(environment)]
    return {canonicalize_name(r.name): next(iter(r.specifier)).version for r in holding}


def declared() -> list[Requirement]:
    """Dependencies and extras of pyproject.toml, without those that name the package itself."""
    text = (ROOT / "pyproject.toml").read_text()
    tables = re.findall(r"^(?:dependencies|[a-z]+) = \[(.*?)\]$", text, flags=re.DOTALL | re.MULTILINE)
    found = [Requirement(r) for table in tables for r in re.findall(r'"([\w.-]+(?:\[[\w,]+\])?[<>=!~][^"]*)"', table)]
    return [r for r in found if r.name not in {"ldm", "setuptools"}]


def test_constraints_are_names_and_versions_alone() -> None:
    for requirement in constraints():
        assert requirement.url is None
        assert [s.operator for s in requirement.specifier] == ["=="]


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_lie_within_the_ranges(python: str) -> None:
    versions = pinned(f"{python}.5")
    assert len(declared()) > 30
    needed = [r for r in declared() if r.marker is None or r.marker.evaluate({"python_version": python})]
    wrong = [str(r) for r in needed if not r.specifier.contains(versions[canonicalize_name(r.name)])]
    assert wrong == []


def test_what_is_installed_is_what_the_constraints_say() -> None:
    versions = pinned(".".join(map(str, sys.version_info[:3])))
    installed = {canonicalize_name(d.metadata["Name"]): d.version for d in metadata.distributions()}
    other = {n: (v, versions.get(n)) for n, v in installed.items() if n not in NOT_OURS and versions.get(n) != v}
    if other and not os.environ.get("CI"):
        pytest.skip(f"installed otherwise (name: installed, constraints.txt): {other}")
    assert other == {}


def test_every_part_runs_and_the_sum_names_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_a.py").write_text("def test_one():\n    assert 1 == 2\n")
    (tmp_path / "test_b.py").write_text(
        "import pytest\ndef test_two():\n    pass\ndef test_three():\n    pytest.skip('no')\n"
    )
    (tmp_path / "test_c.py").write_text("import nothing_of_this_name\n")
    made = [suite.Part(name=n, folders=[str(tmp_path / f"test_{n}.py")]) for n in "abc"]
    monkeypatch.setattr(suite, "parts", lambda in_ci: made)
    options = ["-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={tmp_path}"]
    assert suite.main(options) == 1
    out = capfd.readouterr().out
    assert out.endswith("1 passed, 2 failed, 1 skipped\n")
    assert "FAILED test_a.py::test_one" in out
    monkeypatch.setattr(suite, "parts", lambda in_ci: made[1:2])
    assert suite.main(options) == 0
    assert suite.main([*options, "-k", "nothing_at_all"]) == 1


def test_every_folder_of_tests_belongs_to_one_part() -> None:
    folders = {p.parent for p in (ROOT / "tests").rglob("test_*.py")}
    named = [ROOT / f for part in suite.parts(in_ci=False) for f in part.folders]
    assert len(set(named)) == len(named)
    assert [p for p in folders if sum(p == f or f in p.parents for f in named) != 1] == []
    assert [f for part in suite.parts(in_ci=True) for f in part.folders if not (ROOT / f).exists()] == []
