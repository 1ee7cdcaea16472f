"""`python -m bench.gpu` runs to its end without a card, and on a machine that lacks packages; its parts are right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import card, runner, schema, table, testing
from bench.gpu.__main__ import _joined, scaled
from bench.gpu.families import FAMILIES
from bench.gpu.graphs import Graphed
from bench.gpu.rows import MODES, Row, every, quick
from ldm.types import Cond

ROOT = Path(__file__).parents[2]
GIB = 2**30


def run(*words: str, path: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--quick", *words]
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=540)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """gpu.json, the page and what was printed of a run on the CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    page = folder / "gpu.md"
    shutil.copy(ROOT / "docs" / "gpu.md", page)
    done = run("--out", str(folder / "gpu.json"), "--docs", str(page))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "gpu.json").read_text()), page.read_text(), done.stdout


def test_it_runs_to_its_end_on_the_cpu(written: tuple[dict[str, Any], str, str]) -> None:
    record, _, printed = written
    assert [(r["family"], r["side"], r["what"]) for r in record["rows"]] == [
        (r.family, r.side, r.what) for r in quick()
    ]
    for row in record["rows"]:
        assert row["status"] == "measured", row
        if row["what"] == "same":
            assert row["apart"] < 1e-4
            continue
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["seconds"]["median"])
        rate = row["images_per_second"] * row["tflop_per_image"] / record["machine"]["peak_tflops"]
        assert row["mfu"] == pytest.approx(rate)
        assert row["planned"]["images_per_second"] > 0
        assert (row["planned"]["peak_gb"] is None) == (row["what"] == "sampling")
        assert f"{row['family']} {row['side']} {row['what']}" in printed
    assert (record["tests"]["failed"], record["tests"]["ended"]) == (0, "")
    assert record["tests"]["passed"] + record["tests"]["skipped"] > 20


def test_what_it_wrote_is_of_the_schema(written: tuple[dict[str, Any], str, str]) -> None:
    record = written[0]
    schema.check(record)
    for broken, told in (
        (record | {"schema": 2}, "schema 2 is not 1"),
        (record | {"rows": [{**record["rows"][0], "status": "fine"}]}, "'fine' is not one of"),
        (record | {"rows": [{**record["rows"][0], "status": "failed"}]}, "says why"),
        (record | {"rows": [{**record["rows"][0], "batch": 2.5}]}, r"rows\[0\].batch: expected int, got float"),
        (record | {"machine": {}}, "machine: 'card' is missing"),
    ):
        with pytest.raises(ValueError, match=told):
            schema.check(broken)


def test_the_table_takes_its_place_in_the_page(written: tuple[dict[str, Any], str, str]) -> None:
    record, page, _ = written
    before, _, rest = (ROOT / "docs" / "gpu.md").read_text().partition(table.BEGIN)
    assert page.startswith(before)
    assert page.endswith(rest.partition(table.END)[2])
    inside = page[len(before) : page.index(table.END)]
    assert record["machine"]["card"] in inside
    assert "the figures mean nothing" in inside
    assert inside.count("| SD 2 | training, all weights | eager |") == 1
    first = next(r for r in record["rows"] if r["what"] == "full" and r["side"] == "ldm")
    assert f"| {first['images_per_second']:.3g} | {100 * first['mfu']:.1f} % |" in inside


BLOCKED = ("diffusers", "deepspeed", "omegaconf", "webdataset", "open_clip", "xformers", "bitsandbytes", "tensorboard")


def test_a_machine_without_the_optional_packages(tmp_path: Path) -> None:
    """Nothing that is missing is imported: its rows and tests are left out and say so."""
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
            import sys

            class Missing:
                @staticmethod
                def find_spec(name, path=None, target=None):
                    if name.split(".")[0] in {BLOCKED!r}:
                        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

            sys.meta_path.insert(0, Missing)
        """)
    )
    done = run("--only", "sd2", "--out", str(tmp_path / "gpu.json"), path=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    for row in record["rows"]:
        needs = "diffusers" if row["side"] == "diffusers" else "deepspeed" if row["what"] == "engine" else ""
        expected = ("left out", f"{needs} is not installed") if needs else ("measured", "")
        assert (row["status"], row["why"]) == expected
    assert not (ROOT / "gpu.md").exists()
    assert "* diffusers is not installed: 4 rows (SD 2, one answer of both" in done.stdout
    assert record["tests"]["failed"] == 0
    assert record["tests"]["skipped"] > 20


WORKER = """
import json, os, signal, sys, time
path, spec = sys.argv[1], json.loads(sys.argv[2])
def say(key, value):
    with open(path, "a") as file:
        file.write(json.dumps([key, value]) + "\\n")
for row in spec["rows"]:
    name = " ".join(row.values())
    say("begin", name)
    if row["what"] == "lora":
        os.kill(os.getpid(), signal.SIGSEGV)
    if row["what"] == "engine":
        time.sleep(60)
    say(name, {"status": "failed" if row["what"] == "same" else "measured", "why": "broken"})
    if row["what"] == "same":
        sys.exit(1)
"""


def test_a_row_that_crashes_hangs_or_breaks_the_card_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def child(words: Any, log: Path) -> subprocess.Popen[bytes]:
        started.append(words)
        log.touch()
        argv = [sys.executable, "-c", WORKER, *words[2:]]
        return subprocess.Popen(argv, start_new_session=True)

    monkeypatch.setattr(runner, "child", child)
    monkeypatch.setattr(runner, "LIMITS", dict.fromkeys(MODES, 2.0))
    rows = [Row("sd2", "ldm", what) for what in ("full", "lora", "sampling", "engine", "same")]
    rows += [Row("sd15", "ldm", "full"), Row("sd15", "diffusers", "full")]
    packages: dict[str, str | None] = {"deepspeed": "1", "diffusers": "1"}
    found = dict(runner.measured(rows, "cpu", False, time.monotonic() + 60, packages))
    assert list(found) == rows
    assert [found[r]["status"] for r in rows] == [
        "measured",
        "failed",
        "measured",
        "failed",
        "failed",
        *["measured"] * 2,
    ]
    assert found[rows[1]]["why"] == "died of SIGSEGV"
    assert found[rows[3]]["why"].startswith("no end within 2")
    assert len(started) == 5  # at first, after each of the three, and for the other side
    assert [a["why"] for _, a in runner.measured(rows, "cpu", False, time.monotonic(), packages)] == [
        "no time was left"
    ] * 7
    assert runner.missing(Row("sd2", "diffusers", "lora"), "cpu", {}) == "diffusers and peft are not installed"
    assert runner.missing(Row("sd2", "ldm", "full", "blocks"), "cuda", {}) == "triton is not installed"
    assert runner.missing(Row("sd2", "ldm", "full", "blocks"), "cpu", {}) == ""


@pytest.mark.parametrize(
    ("name", "memory", "known"),
    [  # names as `nvidia-smi` prints them, bytes as `total_memory` is
        ("NVIDIA H200", 143771 * 2**20, "h200"),
        ("NVIDIA H100 80GB HBM3", 81559 * 2**20, "h100"),
        ("NVIDIA A100-SXM4-80GB", 79.15 * GIB, "a100-80g"),
        ("NVIDIA A100 80GB PCIe", 79.25 * GIB, "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", 39.4 * GIB, "a100-40g"),
        ("NVIDIA GeForce RTX 4090", 23.6 * GIB, "rtx4090"),
        ("Tesla V100-SXM2-32GB", 31.7 * GIB, "v100-32g"),
        ("NVIDIA L40S", 44.4 * GIB, "l40s"),
        ("NVIDIA A10G", 22.1 * GIB, "a10g"),
        ("NVIDIA H100 PCIe", 79.2 * GIB, None),  # of other figures than the SXM card
        ("NVIDIA H100 NVL", 93.6 * GIB, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.75 * GIB, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7 * GIB, None),
        ("NVIDIA GeForce RTX 4090 D", 23.6 * GIB, None),
        ("NVIDIA GH200 480GB", 94.5 * GIB, None),
        ("Tesla V100-SXM2-16GB", 15.8 * GIB, None),
        ("NVIDIA A10", 22.1 * GIB, None),
        ("NVIDIA L4", 22.1 * GIB, None),
    ],
)
def test_cards_are_known_by_their_names(name: str, memory: float, known: str | None) -> None:
    found = card.recognised(name, memory)
    assert (found.name if found else None) == known


def test_a_card_that_is_not_known_has_its_measured_rates() -> None:
    hardware, source = card.hardware_of("NVIDIA X1", 32e9, {"bf16": 200.0, "fp32": 90.0, "memory": 1500.0}, "cuda")
    assert (source, hardware.matmul, hardware.matmul_fp32, hardware.bandwidth, hardware.host) == (
        "measured", 200.0, 90.0, 1500.0, False,
    )  # fmt: skip
    assert card.hardware_of("NVIDIA H200", 150.75e9, {}, "cuda")[1] == "maker"


def test_a_row_has_the_share_of_the_peak_and_its_plan() -> None:
    """100 images a second of 2 TFLOP on a card of 1000 TFLOP/s are a fifth of it."""
    answer = {"status": "measured", "batch": 8, "images_per_second": 100.0, "seconds": {"median": 0.08}}
    planned = {"sd2 full": {"flops": 2e12, "batches": {"8": {"seconds": 0.1, "peak_gb": 20.0}}}}
    row = _joined(Row("sd2", "ldm", "full"), answer, FAMILIES["sd2"], planned, {"peak_tflops": 1000.0})
    assert row["mfu"] == pytest.approx(0.2)
    assert row["planned"] == {"images_per_second": 80.0, "peak_gb": 20.0}
    assert _joined(Row("sd2", "ldm", "full"), answer, FAMILIES["sd2"], {}, {"peak_tflops": 1.0})["mfu"] is None


def test_the_whole_of_flux_is_on_the_line_through_its_parts() -> None:
    def row(family: str, seconds: float, peak: float, batch: int = 4) -> dict[str, Any]:
        told = {"status": "measured", "batch": batch, "peak_gb": peak, "seconds": {"median": seconds}}
        return Row(family, "ldm", "full").record() | told

    whole = scaled([row("flux1", 0.1 + 2 * 0.3, 1 + 2 * 5), row("flux2", 0.1 + 4 * 0.3, 1 + 4 * 5)])
    assert whole[0]["seconds"] == pytest.approx(0.1 + 19 * 0.3)
    assert whole[0]["images_per_second"] == pytest.approx(4 / (0.1 + 19 * 0.3))
    assert whole[0]["peak_gb"] == pytest.approx(1 + 19 * 5)
    assert scaled([row("flux1", 0.7, 11.0), row("flux2", 1.3, 21.0, batch=2)]) == []


def test_every_row_is_there_once_and_the_long_ones_are_last() -> None:
    rows = every()
    assert len(set(rows)) == len(rows)
    assert {r.family for r in rows} == set(FAMILIES)
    for family in FAMILIES:
        for side in ("ldm", "diffusers"):
            eager = {r.what for r in rows if (r.family, r.side, r.mode) == (family, side, "eager")}
            assert {"full", "lora", "sampling"} <= eager
    assert min(i for i, r in enumerate(rows) if r.mode == "whole") > max(
        i for i, r in enumerate(rows) if r.what == "lora"
    )


def test_outcomes_of_tests_are_told_apart() -> None:
    gone = {"outcome": "error", "why": "ModuleNotFoundError: No module named 'open_clip.model'"}
    assert testing.outcome(gone) == ("skipped", "open_clip is not installed")
    assert testing.outcome({"outcome": "error", "why": "assert 1 == 2"}) == ("failed", "assert 1 == 2")
    assert testing.outcome({"outcome": "passed", "why": ""}) == ("passed", "")
    found = testing.files()
    own = {f"tests/gpu/{p.name}" for p in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert own | {"tests/distributed/test_gpu.py", "tests/unit/test_pipeline_speed.py"} <= set(found)
    assert {"tests/gpu/test_engine.py", "tests/distributed/test_gpu.py"} <= set(found[-3:]), "slow ones last"


def test_failing_tests_are_named_and_a_run_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_some.py").write_text(
        "import time\nimport pytest\n\n\n@pytest.mark.gpu\ndef test_good():\n    pass\n\n\n"
        "@pytest.mark.gpu\ndef test_bad():\n    assert 1 == 2\n\n\n"
        "@pytest.mark.gpu\ndef test_missing():\n    import no_such_package\n\n\n"
        "def test_another():\n    raise OSError\n\n\n"
        "@pytest.mark.gpu\ndef test_slow():\n    time.sleep(600)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    monkeypatch.setattr(testing, "files", lambda: ["--rootdir", str(tmp_path), str(tmp_path / "test_some.py")])
    told: list[str] = []
    found = testing.run(tmp_path, 20, told.append)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert [one["why"] for one in found["failing"]] == ["assert 1 == 2"]
    assert found["failing"][0]["name"].endswith("test_some.py::test_bad")
    assert found["left_out"] == {"no_such_package is not installed": 1}
    assert found["ended"] == "stopped after 20 s"
    assert len(told) == 3


def test_a_graphs_memory_is_its_own() -> None:
    """On the CPU: the second call of a shape is told the new values in the memory of the first."""
    places: list[int] = []

    def call(x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        places.append(x.data_ptr())
        return x * t + cond["text"]

    graphed = Graphed(call)
    for value in (2.0, 3.0):
        x, t, text = torch.full((2,), value), torch.tensor([10.0]), torch.full((2,), value)
        assert torch.equal(graphed(x, t, {"text": text}), 10 * x + text)
    assert len(set(places)) == 1
    assert graphed(torch.ones(3), torch.ones(1), {"text": torch.ones(3)}).shape == (3,)


def test_mistakes_are_named() -> None:
    def said(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "bench.gpu", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        return done.stderr

    assert "--device cpu: is only to see that it runs; add --quick" in said("--device", "cpu")
    assert "--minutes must be above 0, got 0" in said("--minutes", "0")
    if not torch.cuda.is_available():
        assert "no cuda device works here" in said()
