"""`ldm evaluate` on one process and on two: the same figures, and no file written twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm import dist
from ldm.checkpoint import files
from ldm.cli import evaluate
from ldm.evaluate import divided
from ldm.metrics import features
from tests import miniature, ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = miniature.project(tmp_path_factory.mktemp("evaluate"))
    miniature.teacher(root)
    return root


def pixels(images: Tensor) -> Tensor:
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def measured(argv: list[str]) -> list[str]:
    """Run the command on this rank; the files that it wrote."""
    warnings.simplefilter("ignore")
    written: list[str] = []
    part, picture, text = divided.Parts.write, Image.Image.save, files.write_text
    network = features.Encoder("pixels@2", pixels)

    def write(self: divided.Parts, rows: range, found: divided.Rows) -> None:
        written.append(str(self.path(rows)))
        part(self, rows, found)

    def save(self: Image.Image, path: Any, *rest: Any, **more: Any) -> None:
        written.append(str(path))
        picture(self, path, *rest, **more)

    def plain(path: Path, content: str) -> None:
        written.append(str(path))
        text(path, content)

    features.load_network = lambda *_, **__: network  # type: ignore[assignment]
    divided.Parts.write, Image.Image.save, files.write_text = write, save, plain  # type: ignore[method-assign]
    try:
        assert evaluate.main(argv) == 0
    finally:
        divided.Parts.write, Image.Image.save, files.write_text = part, picture, text  # type: ignore[method-assign]
    return written


def close(a: Any, b: Any) -> bool:
    """Equal, numbers to 1e-6; times and the number of processes are left out."""
    if isinstance(a, dict):
        left = {k for k in a if "seconds" in k or k == "processes"}
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a.keys() - left)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return b == (pytest.approx(a, abs=1e-6) if isinstance(a, float) else a)


COMMANDS = {
    "features": ["--count", "7", "--batch", "2", "--cache", "CACHE", "--keep", "KEEP"],
    "retrieval": ["--count", "7", "--batch", "2", "--candidates", "4", "--keep", "KEEP"],
    "prompts": ["--count", "3", "--batch", "5", "--each", "2", "--no-diversity", "--keep", "KEEP", "--sheet", "SHEET"],
    "samplers": ["--count", "6,3:4", "--batch", "2", "--samplers", "ddim,lcm", "--steps", "1,3", "--candidates", "4"],
}


def command(name: str, root: Path, out: Path) -> list[str]:
    places = {"CACHE": str(out / "cache"), "KEEP": str(out / "keep"), "SHEET": str(out / "sheet.png")}
    argv = [name, "--data", str(root / "data"), "--model", str(root / "teacher")]
    if name == "samplers":
        argv += ["--splits", "train,heldout", "--out", str(out / "table")]
    else:
        argv += ["--split", "train", "--steps", "2", "--out", str(out / "figures.json")]
    argv += [] if name == "features" else ["--clip", str(root / "towers")]
    return argv + [places.get(word, word) for word in COMMANDS[name]]


def drawn(written: list[str], out: Path) -> list[str]:
    """The parts and pictures among the files written below `out`."""
    paths = [Path(p).relative_to(out) for p in written if p.endswith((".safetensors", ".png"))]
    return [str(p) for p in paths if p.name != "sheet.png"]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_two_processes_give_the_figures_of_one_and_write_no_file_twice(root: Path, tmp_path: Path, name: str) -> None:
    out = {world: tmp_path / str(world) for world in (1, 2)}
    written = {world: ranks.run(measured, world, command(name, root, out[world])) for world in (1, 2)}
    file = Path("table", "results.json") if name == "samplers" else Path("figures.json")
    one, two = (json.loads((out[world] / file).read_text()) for world in (1, 2))
    assert close(one, two)
    first, second = written[2]
    assert not set(first) & set(second)
    assert len([*first, *second]) == len({*first, *second})
    parts = [drawn(own, out[2]) for own in (first, second)]
    assert min(map(len, parts)) >= sum(map(len, parts)) // 3, "both work"
    assert sorted(parts[0] + parts[1]) == sorted(drawn(written[1][0], out[1])), "whatever the number of processes"
    if name != "samplers":
        kept = sorted((out[2] / "keep").iterdir())
        assert all(p.name.startswith("train-00000") and len(p.stem.rsplit("-", 1)[1]) == 16 for p in kept)
        before = [p.stat().st_mtime_ns for p in kept]
        ranks.run(measured, 2, command(name, root, out[2]))  # goes on: nothing is drawn again
        assert before == [p.stat().st_mtime_ns for p in kept]
        assert close(one, json.loads((out[2] / file).read_text()))
    if name == "prompts":
        assert (out[1] / "sheet.png").read_bytes() == (out[2] / "sheet.png").read_bytes()


def refused(argv: list[str]) -> str:
    with pytest.raises(ValueError) as error:
        evaluate.main(argv)
    return str(error.value)


def test_a_row_measured_otherwise_ends_all_ranks(root: Path, tmp_path: Path) -> None:
    argv = command("samplers", root, tmp_path)
    ranks.run(measured, 1, argv)
    told = ranks.run(refused, 2, [*argv, "--seed", "5", "--network", "efficientnet_lite0"])
    assert "seed 0, now 5" in told[0] or "network" in told[0]
    assert told[1] == "stopped; rank 0 tells why"


def rows(total: int, size: int) -> Tensor:
    """Squares of the indices, described by whichever rank has them."""
    found = divided.described(total, size, lambda part: {"square": torch.tensor([i * i for i in part])})
    return found["square"]


@pytest.mark.parametrize(("total", "size"), [(1, 4), (5, 2), (7, 3), (8, 1)])
def test_rows_come_in_the_order_of_the_pictures(total: int, size: int) -> None:
    for found in ranks.run(rows, 2, total, size):
        assert found.tolist() == [i * i for i in range(total)]


THREADS = "import torch; from ldm import dist\nwith dist.group(): print('threads', torch.get_num_threads(), flush=True)"


def test_processes_share_the_cores_and_the_launcher_starts_them() -> None:
    """Threads of all processes together are at most the cores, with and without the launcher's own setting."""
    cores = len(os.sched_getaffinity(0))
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    launch = [sys.executable, "-m", "launch", "local", "--procs", "2", "--", sys.executable, "-c", THREADS]
    done = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    counts = [int(line.split()[-1]) for line in (done.stdout + done.stderr).splitlines() if "threads" in line]
    assert len(counts) == 2
    assert sum(counts) <= max(2, cores)


@pytest.mark.slow
def test_the_command_under_the_launcher(root: Path, tmp_path: Path) -> None:
    argv = command("retrieval", root, tmp_path)
    line = [sys.executable, "-m", "launch", "local", "--procs", "2", "--", sys.executable, "-m", "ldm.cli", "evaluate"]
    done = subprocess.run([*line, *argv], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written:") == 1
    assert json.loads((tmp_path / "figures.json").read_text())["protocol"]["count"] == 7
    assert dist.world_size() == 1
