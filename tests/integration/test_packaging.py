"""The package outside of the repository: a wheel works from an empty folder; containers name what there is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

import ldm

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def tracked(*folders: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no clone: nothing tells which files there should be")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy of what is tracked, so that nothing is left in the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked("ldm", "launch", "configs", *(p.name for p in ROOT.iterdir() if p.is_file())):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(ROOT / name, source / name) if _same_disk(source) else (source / name).write_bytes(
            (ROOT / name).read_bytes()
        )
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next(out.glob("*.tar.gz"))


def _same_disk(folder: Path) -> bool:
    return os.stat(folder).st_dev == os.stat(ROOT).st_dev


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the sdist, as pip builds it."""
    place, out = tmp_path_factory.mktemp("unpacked"), tmp_path_factory.mktemp("wheel")
    shutil.unpack_archive(sdist, place)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=next(place.iterdir()), check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_has_every_file_that_is_tracked(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    data = f"ldm-{ldm.__version__}.data/data/share/ldm/"
    there = {name.removeprefix(data) for name in names if ".dist-info/" not in name}
    assert there == tracked("ldm", "launch", "configs")
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_it_works_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """With the packages of this environment and not its ldm; the model and the demo's data are inside."""
    target, empty = tmp_path / "installed", tmp_path / "empty"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), sysconfig.get_path("purelib")]),
                   "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip

    code = """
import contextlib, sys, ldm
from ldm.cli.__main__ import main
print(ldm.__file__)
assert main(["--help"]) == 0
with contextlib.suppress(SystemExit):
    main(["demo", "--help"])
sys.exit(main(["sample", "a red apple", "--steps", "1", "--out", "pictures"]))
"""  # one process: each would load torch again
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(str(target))
    assert "draw pictures of prompts" in done.stdout
    assert "usage: ldm demo" in done.stdout
    assert (empty / "pictures" / "0000-a-red-apple.png").is_file()
    assert (target / "share" / "ldm" / "configs" / "finetune" / "sdxl_lora.yaml").is_file()


def extras(text: str) -> list[str]:
    return [name for found in re.findall(r'"\.\[([\w,]+)\]"', text) for name in found.split(",")]


@pytest.mark.parametrize("name", ["Dockerfile", "launch/apptainer.def"])
def test_containers_copy_what_is_there(name: str) -> None:
    """Neither can be built here: what they name exists, and versions are the package's."""
    text = (ROOT / name).read_text()
    if name == "Dockerfile":
        copied = [word for line in re.findall(r"^COPY (.*)", text, re.MULTILINE) for word in line.split()[:-1]]
        ignored = (ROOT / ".dockerignore").read_text().splitlines()
        assert {f"!{word}" for word in copied} <= set(ignored)
    else:
        section = re.search(r"^%files\n(.*?)\n\n", text, re.DOTALL | re.MULTILINE)
        assert section is not None
        copied = [line.split()[0] for line in section[1].splitlines()]
        assert all(line.split()[1] == f"/opt/ldm/{line.split()[0]}" for line in section[1].splitlines())
    assert [word for word in copied if not (ROOT / word).exists()] == []
    assert {"ldm", "launch", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE"} <= set(copied)
    known = set(re.findall(r"^(\w+) = \[", PYPROJECT.split("[project.optional-dependencies]")[1], re.MULTILINE))
    assert extras(text)
    assert set(extras(text)) <= known
    assert re.findall(r'version[ =]"?([\d.]+)"?$', text, re.MULTILINE) == [ldm.__version__]
    python = re.search(r"python:(\d+)\.(\d+)-slim", text)
    assert python is not None
    assert (int(python[1]), int(python[2])) >= (3, 10)


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version"} <= set(cited)
    assert cited["version"] == ldm.__version__
    assert f'license = "{cited["license"]}"' in PYPROJECT
    assert all({"name", "family-names"} & set(author) for author in cited["authors"])
