"""docs/team.md, its own commands and configs in small: tars on S3, the shipped model, one process, few steps."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from safetensors import safe_open

from launch.__main__ import main as launch
from ldm.cli.__main__ import main
from ldm.data.loader import DataConfig, Loader
from ldm.data.manifest import Manifest
from tests.documents import ROOT, commands
from tests.unit.data.stores import serving

PAGE = ROOT / "docs" / "team.md"
SMALLER = {
    "1024": "64", "32": "1", "models/sdxl": "emoji", "10000": "8", "inception": "efficientnet_lite0",
    "2000000": "40", "/local/ssd": "ssd", "600": "0", "16": "8",
}  # fmt: skip
"""Words of the page's commands, and what stands for them."""
TRAIN = (
    "train.steps=2", "train.batch=8", "train.checkpoint.every=2", "data.last=wrap", "train.log.tensorboard=false",
    "task.samples.prompts=[a tree]", "task.samples.settings.steps=2", "train.optim.warmup=0",
)  # fmt: skip


def tar(path: Path, batch: Any, first: int, count: int) -> None:
    """As img2dataset writes them: jpg, txt and json of each; every sixth has a watermark."""
    images = ((batch["image"].permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    with tarfile.open(path, "w") as out:
        for i in range(first, first + count):
            buffer = io.BytesIO()
            Image.fromarray(images[i]).save(buffer, "JPEG")
            facts = {
                "width": 1024,
                "height": 1024,
                "pwatermark": 0.9 if i % 6 == 0 else 0.1,
                "caption": batch["caption"][i],
            }
            members = {
                "jpg": buffer.getvalue(),
                "txt": batch["caption"][i].encode(),
                "json": json.dumps(facts).encode(),
            }
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{i:09d}.{kind}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder, beside a bucket `team` of 48 pictures and 16 that were held out."""
    s3fs = pytest.importorskip("s3fs")
    batch = Loader(DataConfig(path="emoji", size=64), seed=0, micro_batch=64).batch(0, 0)
    for name, parts in {"pictures": ((0, 24), (24, 24)), "heldout": ((48, 16),)}.items():
        (tmp_path / "team" / name).mkdir(parents=True)
        for number, (first, count) in enumerate(parts):
            tar(tmp_path / "team" / name / f"{number:05d}.tar", batch, first, count)
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "prompts.txt").write_text("a red apple\n")
    monkeypatch.chdir(folder)
    s3fs.S3FileSystem.clear_instance_cache()
    with serving(tmp_path) as server:
        for name, value in {
            "ENDPOINT_URL": server.address,
            "ACCESS_KEY_ID": "test",
            "SECRET_ACCESS_KEY": "test",
        }.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield folder
    s3fs.S3FileSystem.clear_instance_cache()


def configs() -> dict[str, dict[str, Any]]:
    """The page's files, by the names in their first lines."""
    found = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return {name: yaml.safe_load(text) for name, text in found}


def smaller(words: list[str]) -> list[str]:
    """A command of the page for what is here."""
    words = [SMALLER.get(word, word) for word in words]
    if words[0] == "train":
        return [*words, *(() if "--print-config" in words else TRAIN)]
    if words[0] == "sample":
        return [*words, "--steps", "2"]
    if words[:2] == ["evaluate", "features"]:
        return [*words, "--steps", "1", "--precision", "fp32"]
    return words


def ran(part: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the commands of the section whose heading begins with `part`; what they printed."""
    text = PAGE.read_text(encoding="utf-8")
    first = text.index(f"\n## {part}")
    last = text.find("\n## ", first + 4)
    lines = range(text[:first].count("\n") + 1, text[: last if last > 0 else len(text)].count("\n") + 2)
    found = [c for c in commands(PAGE) if c.line in lines]
    assert found
    said = ""
    for command in found:
        words = command.words
        if words[2:3] == ["launch"]:
            if words[3] == "logs":
                continue  # of a job; tests/unit/launch has its own
            own, words = words[3 : words.index("--")], words[words.index("--") + 1 :]
            capsys.readouterr()
            assert launch([*own, "--dry-run", "--", *words]) == 0, command
            script = capsys.readouterr().out
            assert f"#SBATCH --nodes={own[own.index('--nodes') + 1]}" in script or "--spares" in own
            assert "ldm" in script
        code = main(smaller(words[1:]))
        out, err = capsys.readouterr()
        assert code == 0, f"{command}: {err}"
        said += out + err
    return said


def test_from_tars_on_s3_to_a_file_for_comfyui(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran("1.", capsys)
    assert Manifest.read(here / "data/pictures").samples("train") == 40  # without the eight that have a watermark
    assert Manifest.read(here / "data/heldout").samples("heldout") == 16
    ran("2.", capsys)
    assert Manifest.read(here / "cache/sdxl").samples("train") == 40
    (here.parent / "team" / "cache").mkdir()
    (here / "cache/sdxl").rename(here.parent / "team/cache/sdxl")  # to S3, as the page says
    config = configs()["team.yaml"]
    config["task"]["base"] = "emoji"
    config["data"]["remote"] = {"cache": str(here / "ssd"), "cache_bytes": 10**9}
    (here / "ssd").mkdir()
    (here / "team.yaml").write_text(yaml.safe_dump(config))
    assert "images: null" in ran("3.", capsys)
    assert "team on 4 x 8 a100-80g" in ran("4.", capsys)
    ran("5.", capsys)
    run = here / "runs/team"
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-2"]
    assert list((here / "ssd").rglob("*.tar")), "shards came into the cache of the node"
    assert main(["train", "team.yaml", *TRAIN, "train.steps=4", "train.checkpoint.every=2"]) == 0
    assert "resuming from" in "".join(capsys.readouterr())
    assert main(["export", f"{run}@2", "out"]) == 0
    ran("7.", capsys)
    assert {"before.json", "after.json"} <= {p.name for p in here.iterdir()}
    ran("8.", capsys)
    with safe_open(here / "sdxl_team.safetensors", "pt") as file:
        names = set(file.keys())
    for prefix in ("model.diffusion_model.", "first_stage_model.", "cond_stage_model."):
        assert any(name.startswith(prefix) for name in names), prefix
    with safe_open(here / "sdxl_team_lora.safetensors", "pt") as file:
        assert all(name.startswith("lora_") for name in file.keys())  # noqa: SIM118


def test_both_configs_stand_on_the_shipped_ones(here: Path) -> None:
    from ldm.config.load import read

    for name, config in configs().items():
        (here / name).write_text(yaml.safe_dump(config))
        tree = read(here / name)
        assert tree["task"]["images"] is None
        assert (tree["task"]["adapter"]["kind"], tree["train"]["batch"]) == ("full", 256)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "memory", "step"), [("team.yaml", "30.4", "2.28"), ("team_sd35.yaml", "34.2", "4.3")])
def test_the_planned_figures_are_the_pages(
    name: str, memory: str, step: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / name).write_text(yaml.safe_dump(configs()[name]))
    cluster = ("--nodes", "4", "--gpus-per-node", "8", "--gpu", "a100-80g", "--samples", "2000000")
    text = PAGE.read_text(encoding="utf-8")
    assert f"{memory} GB a GPU" in text
    assert f"{step} s a step" in text
    assert main(["plan", name, *cluster]) == 0
    said = capsys.readouterr().out
    (chosen,) = [line for line in said.splitlines() if line.endswith("<")]
    assert f"{float(chosen.split()[-3]):.1f}" == memory
    (took,) = re.findall(r"a step +([\d.]+) s", said)
    assert f"{float(took):.{len(step) - 2}f}" == step
