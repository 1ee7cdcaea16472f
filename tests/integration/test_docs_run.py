"""Commands of the pages that are not marked are run, page by page, beside small pictures and with fewer steps."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from ldm.cli.__main__ import VERBS, main
from ldm.cli.options import is_override
from ldm.data.loader import DataConfig, Loader
from tests.documents import PRESENT, ROOT, commands

WITH = [page for page in PRESENT if any(c.runs for c in commands(page))]
SHORTER = {
    "sample": ("--steps", "2"),
    "edit": ("--steps", "2"),
    "finetune": ("--steps", "1", "--batch", "1", "--no-cache"),
    "evaluate": ("--count", "4"),
    "train": ("train.steps=1", "train.batch=1", "train.accumulate=1", "task.samples.settings.steps=1"),
}
"""Put behind what a page says: the last of an option that comes twice is taken."""
DRAWN = ("retrieval", "features")


def shorter(words: Sequence[str]) -> list[str]:
    """A command's words with what makes it short."""
    verb, *rest = words
    more = list(SHORTER.get(verb, ()))
    if verb == "sample" and {"--from-png", "--list-samplers"} & set(rest):
        more = []
    if verb == "train" and {"--print-config", "--dry-run"} & set(rest):
        more = []
    if verb == "evaluate" and rest[0] in DRAWN:
        more += ["--steps", "1"]
    if verb == "finetune" and rest[0] == "dreambooth":
        more += ["--num-class-images", "2"]
    return [verb, *rest, *more]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photo.png, mask.png, my_dog/ and captioned_folder/, as the pages name them, of the embedded pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    batch = Loader(DataConfig(path="emoji", size=64), seed=0, micro_batch=4).batch(0, 0)
    images = ((batch["image"].permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    (folder / "my_dog").mkdir()
    (folder / "captioned_folder").mkdir()
    for i, (image, caption) in enumerate(zip(images, batch["caption"])):
        Image.fromarray(image).save(folder / "my_dog" / f"{i}.png")
        Image.fromarray(image).save(folder / "captioned_folder" / f"{i}.png")
        (folder / "captioned_folder" / f"{i}.txt").write_text(caption)
    Image.fromarray(images[0]).resize((128, 128)).save(folder / "photo.png")
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 32, 96, 96))
    mask.save(folder / "mask.png")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.mark.parametrize("page", WITH, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_does_what_it_says(
    page: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command ends with exit code 0, after those before it; what it writes is there for the next."""
    folder = shutil.copytree(pictures, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(folder)
    for command in commands(page):
        if command.runs:
            assert command.words[0] == "ldm", f"{command}: no test runs this; mark it"
            code = main(shorter(command.words[1:]))
            assert code == 0, f"{command}: {capsys.readouterr().err}"


def test_every_kind_of_work_is_run_somewhere() -> None:
    """By the pages of the jobs: verbs whose commands are all marked are few, and named here."""
    run = {c.words[1] for page in WITH for c in commands(page) if c.runs}
    assert set(VERBS) - run <= {"demo", "distill", "export", "serve", "doctor", "studio"}


def test_shorter_takes_the_place_of_what_the_page_says() -> None:
    assert shorter(["sample", "a", "--steps", "50"])[-2:] == ["--steps", "2"]
    assert shorter(["sample", "--from-png", "x"]) == ["sample", "--from-png", "x"]
    assert all(is_override(w) for w in SHORTER["train"])
