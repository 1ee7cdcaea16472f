"""A studio on five emoji in its own process, and one browser for all checks."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
WORDS = ("grinning cat", "cat with tears of joy", "smiling cat with heart-eyes", "cat with wry smile", "kissing cat")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [
        name
        for name, there in (("gradio", _has("gradio")), ("playwright", _has("playwright")),
                            ("chromium", Path(CHROMIUM).is_file()))
        if not there
    ]  # fmt: skip
    for item in items:
        if missing and Path(item.fspath).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)}"))


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def emoji(folder: Path) -> None:
    """Five pictures of cats with captions, from the embedded data."""
    import json

    from ldm.data import decode
    from ldm.data.manifest import Manifest, resolve
    from ldm.data.shards import Shards

    shards, left = Shards(Manifest.read(resolve("emoji")), "train"), set(WORDS)
    folder.mkdir()
    for i in range(len(shards)):
        told = json.loads(shards.read(i, only=("json",))[1]["json"])
        word = told["captions"][0][0]
        if word in left:
            left.discard(word)
            name = word.replace(" ", "-")
            decode.picture(decode.image_member(shards.read(i)[1])).save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(word + "\n")
        if not left:
            return
    raise AssertionError(f"not in the data: {left}")


@dataclass
class Served:
    """A studio that runs."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    token: str = ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def environment() -> dict[str, str]:
    """Of processes that run this checkout's code."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LDM_AUTO_PRECISION": "fp32"}


def serve(folder: Path, *more: str) -> Served:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = (folder / "studio.log").open("ab")
    command = [sys.executable, "-m", "ldm.cli", "studio", "--port", str(port), *more]
    process = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log, start_new_session=True)
    log.close()
    made = Served(folder, port, process)
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(made.address, timeout=5).close()
            return made
        except urllib.error.HTTPError:
            return made  # 401: there, and asks for its token
        except OSError:
            assert process.poll() is None, (folder / "studio.log").read_text()
            assert time.monotonic() < end, (folder / "studio.log").read_text()
            time.sleep(0.2)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("studio")
    emoji(made / "cats")
    return made


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()
