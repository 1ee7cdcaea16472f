"""The commands of the templates beside training, on the cluster: encode by several ranks, a sample array, evaluate."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import Run

from ldm.data.manifest import Manifest
from tests import miniature

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
LDM = (sys.executable, "-m", "ldm.cli")


def test_encode_then_sample_as_an_array_then_evaluate(run: Run, tmp_path: Path) -> None:
    root = miniature.project(tmp_path / "project")
    (run.folder / "prompts").mkdir()
    for task, lines in enumerate(("a red apple\na tree\n", "a cat\n")):
        (run.folder / "prompts" / f"{task}.txt").write_text(lines)
    site = tmp_path / "site.toml"
    site.write_text('[env]\nDS_ACCELERATOR = "cpu"\nTORCHDYNAMO_DISABLE = "1"\n')
    cache, drawn = run.folder / "cache", run.folder / "samples"
    common = ("--site", str(site), "--no-preflight")
    models = ("--vae", str(root / "autoencoder"), "--text", str(root / "towers"))
    encode = run.submit(
        *common, "--nodes", "2", "--ranks-per-node", "1",
        command=(*LDM, "data", "encode", str(root / "data"), str(cache), *models, "--size", "16"),
    )  # fmt: skip
    sample = run.submit(
        *common, "--array", "0-1", "--dependency", f"afterok:{encode}",
        command=(*LDM, "sample", "--from-file", f"{run.folder}/prompts/{{array}}.txt", "--steps", "2",
                 "--out", f"{drawn}/{{array}}"),
    )  # fmt: skip
    figures = run.folder / "reconstruction.json"
    evaluate = run.submit(
        *common, "--dependency", f"afterok:{sample}",
        command=(*LDM, "evaluate", "reconstruction", "--count", "4", "--out", str(figures)),
    )  # fmt: skip
    end = run.cluster.wait(evaluate, "COMPLETED", "FAILED", "CANCELLED", timeout=600)
    assert end == "COMPLETED", run.output(encode) + run.output(evaluate)
    manifest = Manifest.read(cache)
    assert manifest.samples("train") == 16
    assert manifest.cached is not None
    assert [len(list((drawn / str(task)).glob("*.png"))) >= n for task, n in enumerate((2, 1))] == [True, True]
    assert json.loads(figures.read_text())
