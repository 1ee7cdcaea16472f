"""DreamBooth, textual inversion and LoRA in miniature: two processes, ZeRO 3, resumed, exported, loaded again."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm import dist
from ldm.config.load import decode, dump
from ldm.config.schema import RunConfig
from ldm.pipeline import TextToImage
from ldm.recipes import assemble
from ldm.recipes.run import run
from ldm.train import trainer
from tests import miniature, ranks

torch.set_num_threads(1)
SLOW = 900.0
SETTINGS = {"sampler": "ddim", "steps": 2, "guidance": 2.0}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny whole model, and a folder of five pictures with captions."""
    root = miniature.project(tmp_path_factory.mktemp("finetune"))
    miniature.teacher(root)
    folder = root / "subject"
    folder.mkdir()
    for color in ("red", "green", "blue", "white"):
        (folder / f"{color}.png").write_bytes(miniature.picture(color, "cross"))
        (folder / f"{color}.txt").write_text(f"a {color} cross\n")
    (folder / "dot.png").write_bytes(miniature.picture("red", "dot"))
    (folder / "dot.txt").write_text("a red dot\n")
    (root / "style").mkdir()
    for shape in ("bar", "square", "dot"):
        (root / "style" / f"{shape}.png").write_bytes(miniature.picture("blue", shape))
    return root


def config(root: Path, out: str, task: dict[str, Any], *, second: str | None = None, **train: Any) -> dict[str, Any]:
    """A run below `root`; `second` names another source of data beside the subject."""
    folder = root / out
    source = lambda name: {"path": str(folder / "data" / name), "size": miniature.SIZE}  # noqa: E731
    data: dict[str, Any] = source("subject")
    if second is not None:
        data = {"kind": "mixture", "sources": [{"data": source("subject")}, {"data": source(second), "weight": 0.7}]}
    samples = {"prompts": task.pop("prompts", ["a red dot", "cross"]), "every": 2, "settings": SETTINGS}
    common = {"base": str(root / "teacher"), "cache": str(folder / "cache"), "samples": samples}
    plain = {"steps": 3, "ema": None, "optim": {"lr": 1e-2, "weight_decay": 0.0}, "checkpoint": {"every": 2, "keep": 0}}
    return {
        "name": out,
        "out": str(folder),
        "task": common | task,
        "data": {"kind": "shards", **data} if "kind" not in data else data,
        "train": miniature.train(**plain | train),
    }


def dreambooth(root: Path, adapter: dict[str, Any]) -> dict[str, Any]:
    prior = {"count": 5, "settings": SETTINGS | {"batch": 2}}
    return {
        "kind": "dreambooth",
        "images": str(root / "subject"),
        "identifier": "sks",
        "noun": "cross",
        "prior": prior,
        "weighting": {"kind": "min_snr"},
        "adapter": adapter,
    }


def pivotal(root: Path) -> dict[str, Any]:
    tokens = [{"token": "<thing>", "vectors": 2, "initializer": ["red"]}]
    adapter = {"kind": "pivotal", "tokens": tokens, "lora": {"kind": "lora", "rank": 2}, "speed": 2.0}
    return dreambooth(root, adapter) | {"identifier": "<thing>"}


def inversion(root: Path) -> dict[str, Any]:
    """Two concepts: a subject of two vectors from one word, and a style of three from two."""
    thing = {"token": "<thing>", "vectors": 2, "initializer": ["red"], "images": str(root / "subject")}
    look = {"token": "<look>", "vectors": 3, "initializer": ["blue", "dog"], "learn": "style"}
    concepts = [thing, look | {"images": str(root / "style")}]
    return {"kind": "textual_inversion", "concepts": concepts, "prompts": ["a <thing>", "red <thing> <look>"]}


def lora(root: Path) -> dict[str, Any]:
    adapter = {"kind": "lora", "rank": 2, "text": True, "targets": ["attention", "convolution"], "dropout": 0.1}
    return {"kind": "finetune", "images": str(root / "subject"), "adapter": adapter}


def train(tree: dict[str, Any], stop_at: int | None = None) -> int:
    """What `ldm train` does, in this process; stopped as by a signal after `stop_at` steps."""
    told = decode(RunConfig, tree)
    build = lambda: assemble(told.task, told.data, told.train, told.seed, told.workers)  # noqa: E731
    if stop_at is not None:
        _stop_after(stop_at)
    with contextlib.redirect_stderr(io.StringIO()):
        return run(build, told.train, told.out, seed=told.seed, resolved=dump(told))


def _stop_after(steps: int) -> None:
    """The signal's flag is set before step `steps` runs; the rank is forked, so that nothing is to be undone."""
    original = trainer.Trainer._one_step

    def one_step(self: Any, *args: Any) -> Any:
        out = original(self, *args)
        if self.step == steps - 1:  # seen before the next step, which is the last
            trainer.Stop.asked = property(lambda _: True, lambda *_: None)  # type: ignore[assignment, method-assign]
        return out

    trainer.Trainer._one_step = one_step  # type: ignore[method-assign]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export."""
    found = {}
    for path in sorted((folder / "export").rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}:{k}": v for k, v in load_file(path).items()}
    return found


CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], str | None]] = {
    "dreambooth full, text": (lambda root: dreambooth(root, {"kind": "full", "text": True}), "class"),
    "dreambooth lora": (lambda root: dreambooth(root, {"kind": "lora", "rank": 2, "dora": True}), "class"),
    "pivotal": (pivotal, "class"),
    "textual inversion": (inversion, "style"),
    "lora, text": (lora, None),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_stage_3_and_resume(case: str, project: Path) -> None:
    """ZeRO 3 on two ranks, stopped and resumed, gives what one process gives under ZeRO 1; the export draws."""
    make, second = CASES[case]
    task, name = make(project), case.replace(" ", "-").replace(",", "")
    runs = {k: config(project, f"{name}-{k}", dict(task), second=second, engine=engine(s)) for k, s in
            (("whole", 3), ("halves", 3), ("alone", 1))}  # fmt: skip
    assert ranks.run(train, 2, runs["whole"], timeout=SLOW) == [0, 0]
    assert ranks.run(train, 2, runs["halves"], 2, timeout=SLOW) == [trainer.AGAIN] * 2
    assert ranks.run(train, 2, runs["halves"], timeout=SLOW) == [0, 0]
    assert ranks.run(train, 1, runs["alone"], timeout=SLOW) == [0]
    found = {k: exported(Path(c["out"])) for k, c in runs.items()}
    assert found["whole"]
    assert all(torch.equal(found["whole"][k], found["halves"][k]) for k in found["whole"])
    if "dropout" not in str(task):  # dropout's masks are of a rank's micro-batch
        assert differing(found["whole"], found["alone"]) < 0.01
    out = Path(runs["whole"]["out"])
    base, tuned = TextToImage.load(str(project / "teacher")), TextToImage.load(out)
    prompt, plain = ("a <thing> <look>", "a red dog") if "inversion" in case else ("a sks cross", "a sks cross")
    prompt, plain = ("a <thing> cross", "a red cross") if case == "pivotal" else (prompt, plain)
    drawn = {seed: tuned(prompt, steps=2, seed=seed)[0].tobytes() for seed in (0, 1)}
    assert drawn[0] != drawn[1]
    assert drawn[0] != base(plain, steps=2)[0].tobytes()
    if "text" in case or case == "pivotal":
        assert (base.encode_text([plain])["text"] - tuned.encode_text([prompt])["text"]).abs().max() > 1e-3
    if "inversion" in case:
        only_new_rows(base, tuned, {"<thing>": 2, "<look>": 3})
    grids = [p.name for p in sorted((out / "samples").iterdir())]
    assert grids == ["step-0000000.png", "step-0000002.png", "step-0000003.png"]
    page = (out / "page.html").read_text()
    assert [page.index(x) for x in ("pictures.png", *(grids[i] for i in (0, 2, 1)))] == sorted(
        page.index(x) for x in ("pictures.png", *grids)
    )
    caches = [json.loads(p.read_text())["cached"] for p in (out / "cache").rglob("manifest.json")]
    assert len(caches) == (1 if second is None else 2)
    assert {c["text_states"] for c in caches} == {case == "dreambooth lora"}  # where the towers are as they were
    if second == "class":
        classes = list(out.rglob("class-*.png"))
        assert len(classes) == 5
        assert len({p.read_bytes() for p in classes}) == 5
        alone = {p.name: p.read_bytes() for p in Path(runs["alone"]["out"]).rglob("class-*.png")}
        assert {p.name: p.read_bytes() for p in classes} == alone  # a picture's noise is its own, whoever draws it


def only_new_rows(base: TextToImage, tuned: TextToImage, vectors: dict[str, int]) -> None:
    """The vocabulary and all weights are the base's; each token stands for its vectors, none where it began."""
    for a, b in [(base.unet, tuned.unet), *((x.model, y.model) for x, y in zip(base.text, tuned.text, strict=True))]:
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    tower = tuned.text[0]
    assert {token: len(ids) for token, ids in tower.tokenizer.added.items()} == vectors
    ids = [i for token in vectors for i in tower.tokenizer.encode(token)]
    words = [tower.tokenizer.encode(w)[0] for w in ("red", "red", "blue", "dog", "blue")]
    rows, start = (tower._embed(torch.tensor([x]))[0] for x in (ids, words))
    assert ((rows - start).abs().amax(1) > 1e-3).all()


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Share of values that differ; Adam moves a key's bias, whose gradient is zero but for rounding, either way."""
    wrong = sum(int(((a[k] - b[k]).abs() > 2e-4).sum()) for k in a)
    return wrong / sum(v.numel() for v in a.values())


def engine(stage: int) -> dict[str, Any]:
    return {"zero_stage": stage, "precision": "fp32"}


def test_loads_in_diffusers(project: Path) -> None:
    """The exports of the runs above, or of new ones, in real pipelines."""
    import diffusers

    assert dist.world_size() == 1
    tree = config(project, "for-diffusers", lora(project), engine=engine(1))
    assert ranks.run(train, 1, tree, timeout=SLOW) == [0]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(project / "teacher")
    before = pipe.encode_prompt("a red dot", "cpu", 1, False)[0]
    pipe.load_lora_weights(Path(tree["out"]) / "export", weight_name="pytorch_lora_weights.safetensors")
    after = pipe.encode_prompt("a red dot", "cpu", 1, False)[0]
    ours = TextToImage.load(tree["out"]).encode_text(["a red dot"])["text"]
    assert (after - ours).abs().max() < 1e-4
    assert (after - before).abs().max() > 1e-3
