"""Fine-tuning with its options: adapters, held-out losses, the best checkpoint, pictures on demand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm import dist
from ldm.config.load import decode
from ldm.config.schema import RunConfig
from ldm.data.manifest import Manifest
from ldm.pipeline import TextToImage
from ldm.recipes import assemble
from ldm.recipes.models import run_of, usable
from ldm.rng import Rng
from ldm.train.validate import LossOnHeldOut
from tests import ranks
from tests.integration.test_finetune import SETTINGS, config, inversion, lora, project, train

__all__ = ["project"]
torch.set_num_threads(1)


def losses(out: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "log" / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["validation_loss"] for r in rows if "validation_loss" in r}


@pytest.mark.parametrize("algo", ["loha", "lokr", "oft"])
def test_an_adapter_trains_draws_and_is_exported_as_it_drew(algo: str, project: Path) -> None:
    task = lora(project) | {"adapter": {"kind": "lora", "rank": 2, "algo": algo, "text": True}}
    tree = config(project, f"algo-{algo}", task, steps=3)
    assert train(tree) == 0
    out = project / f"algo-{algo}"
    tensors = load_file(out / "export" / "lycoris.safetensors")
    part = {"loha": "hada_w1_a", "lokr": "lokr_w1", "oft": "oft_blocks"}[algo]
    assert any(k.startswith("lora_unet_") and k.endswith(part) for k in tensors)
    assert any(k.startswith("lora_te_") for k in tensors)
    tuned, before = TextToImage.load(out), TextToImage.load(project / "teacher")
    told = decode(RunConfig, tree)
    settings: Any = told.task
    settings = settings.samples.settings
    drawn = tuned.sample(["a red dot", "cross"], settings=settings)
    assert not torch.allclose(drawn, before.sample(["a red dot", "cross"], settings=settings), atol=0.02)
    grid = Image.open(out / "samples" / "step-0000003.png")
    from ldm.data.grid import sheet, to_pil

    ours = sheet(to_pil(drawn), 2)
    difference = torch.tensor(list(ours.tobytes())).float() - torch.tensor(list(grid.tobytes())).float()
    assert difference.abs().max() <= 2  # of 255: merged weights round otherwise


def test_going_on_from_a_run_begins_where_it_ended(project: Path) -> None:
    task = lora(project) | {"adapter": {"kind": "lora", "rank": 2}}
    assert train(config(project, "first", task, steps=3)) == 0
    again = lora(project) | {"adapter": {"kind": "lora", "rank": 2, "start": str(project / "first")}}
    assert train(config(project, "second", again, steps=1, optim={"lr": 1e-9, "weight_decay": 0.0})) == 0
    end = Image.open(project / "first" / "samples" / "step-0000003.png")
    begin = Image.open(project / "second" / "samples" / "step-0000000.png")
    assert (torch.tensor(list(end.tobytes())).float() - torch.tensor(list(begin.tobytes())).float()).abs().max() <= 1
    wrong = lora(project) | {"adapter": {"kind": "lora", "rank": 3, "start": str(project / "first")}}
    with pytest.raises(ValueError, match=r"task.adapter.start .*first.*rank 2 .* is not the configured rank 3"):
        train(config(project, "third", wrong, steps=1))


def test_a_share_of_the_folder_validates_and_the_best_checkpoint_stays(project: Path) -> None:
    """The rate is so large that the loss rises: the best step is an early one, gone from the run's checkpoints."""
    tree = config(
        project, "held", lora(project), steps=6, optim={"lr": 0.5, "weight_decay": 0.0},
        validate={"share": 0.4, "every": 1, "samples": 8, "times": 8, "keep_best": True},
        checkpoint={"every": 2, "keep": 1},
    )  # fmt: skip
    tree["data"]["last"] = "wrap"
    assert train(tree) == 0
    out = project / "held"
    manifest = Manifest.read(out / "data" / "subject")
    assert (manifest.samples("train"), manifest.samples("test")) == (3, 2)
    found = losses(out)
    assert set(found) == {0, 1, 2, 3, 4, 5, 6}
    best = min((v, k) for k, v in found.items() if k > 0)[1]
    assert json.loads((out / "best.json").read_text()) == {"step": best, "validation_loss": found[best]}
    assert [p.name for p in (out / "best").glob("step-*")] == [f"step-{best}"]
    assert best < 6
    assert run_of(f"{out}@best") == (out, best)
    folder = Path(usable(f"{out}@best", "--model"))
    assert TextToImage.load(folder) is not None
    last = load_file(out / "export" / "pytorch_lora_weights.safetensors")
    kept = load_file(folder / "pytorch_lora_weights.safetensors")
    assert any(not torch.equal(kept[k], last[k]) for k in kept)
    with pytest.raises(ValueError, match="kept no best checkpoint"):
        run_of(f"{project / 'teacher'}@best")


@pytest.mark.parametrize("kind", ["dreambooth", "inversion", "full"])
def test_every_method_validates_on_a_folder(kind: str, project: Path) -> None:
    if kind == "dreambooth":
        task: dict[str, Any] = {
            "kind": "dreambooth", "images": str(project / "subject"), "identifier": "sks", "noun": "cross",
            "prior": None, "adapter": {"kind": "lora", "rank": 2},
        }  # fmt: skip
    elif kind == "inversion":
        task = inversion(project)
        task = task | {"concepts": task["concepts"][:1], "prompts": ["a <thing>"]}
    else:
        task = lora(project) | {"adapter": {"kind": "full"}}
    place = project / f"on-{kind}"
    images = project / "style" if kind != "full" else project / "subject"
    validate = {"images": str(images), "path": str(place / "data" / "validation"), "every": 0, "samples": 6}
    assert train(config(project, f"on-{kind}", task, steps=2, validate=validate)) == 0
    found = losses(place)
    assert set(found) == {0, 2} or set(found) == {2}
    assert all(0 < v < 10 for v in found.values())


def test_the_loss_is_the_mean_over_samples_of_the_objective(project: Path) -> None:
    """Computed sample by sample with the noise of its place and MLPerf's times, without the hook."""
    tree = config(project, "closed", lora(project), steps=1, batch=2,
                  validate={"share": 0.4, "every": 1, "samples": 4, "times": 4})  # fmt: skip
    tree["data"]["last"] = "wrap"
    told = decode(RunConfig, tree)
    made = assemble(told.task, told.data, told.train, told.seed, told.workers)
    hook = made.hooks[-1]
    assert isinstance(hook, LossOnHeldOut)
    batch = hook._batch
    assert batch["time"].tolist() == [i / 4 for i in range(len(batch["key"]))]
    assert set(batch["key"]).isdisjoint(made.loader.batch(0, 0)["key"] if hasattr(made.loader, "batch") else [])

    class Engine:
        def forward(self, part: Any, rng: Any) -> Any:
            return made.objective(part, rng)

    class Trainer:
        engine, config = Engine(), replace(told.train, batch=dist.world_size())

    fake: Any = Trainer()
    total = 0.0
    with torch.no_grad():
        for i in range(len(batch["key"])):
            one = {k: v[i : i + 1] for k, v in batch.items()} | {"weight": torch.ones(1)}
            total += float(made.objective(one, Rng.of(told.seed + 1, torch.tensor([i])))[0])
    assert hook.loss(fake) == pytest.approx(total / len(batch["key"]), rel=1e-5)


@pytest.mark.parametrize(("changes", "said"), [
    ({"validate": {"share": 0.4}}, "data.split: 'all' holds the share"),
    ({"validate": {"images": "nowhere"}}, "no such folder"),
    ({"validate": {"split": "other"}}, "'other' is none of"),
])  # fmt: skip
def test_what_cannot_validate_is_one_line(changes: dict[str, Any], said: str, project: Path) -> None:
    tree = config(project, f"odd-{len(said)}", lora(project), steps=1, **changes)
    if "share" in changes["validate"]:
        tree["data"]["split"] = "all"
    with pytest.raises(ValueError, match=said):
        train(tree)


def test_prompts_have_settings_of_their_own_and_a_file_asks_for_pictures(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.train.demand.SECONDS", 0.0)
    task = lora(project)
    tree = config(project, "own", task | {"prompts": ["a red dot", "cross", "a blue bar"]}, steps=5)
    tree["task"]["samples"] |= {
        "every": 0, "first": False,
        "own": [{}, {"size": [16, 32], "steps": 3}, {"seed": 7, "guidance": 1.0, "negative": "grey"}],
    }  # fmt: skip
    out = project / "own"
    out.mkdir(parents=True, exist_ok=True)
    (out / "sample-now").touch()
    assert train(tree) == 0
    assert not (out / "sample-now").exists()
    grids = sorted(p.name for p in (out / "samples").glob("*.png"))
    assert grids == ["step-0000001.png", "step-0000005.png"]  # on demand at the first step, and at the end
    tuned = TextToImage.load(out)
    told: Any = decode(RunConfig, tree).task
    common = told.samples.settings
    picture = Image.open(out / "samples" / "step-0000005.png")
    side, gap = 16, 2
    alone = {
        (0, 0): tuned.sample(["a red dot"], settings=common, indices=[0])[0],
        (1, 0): tuned.sample(["cross"], settings=replace(common, size=(16, 32), steps=3), indices=[1])[0],
        (0, 1): tuned.sample(["a blue bar"], settings=replace(common, seed=7, guidance=1.0, negative="grey"))[0],
    }
    from ldm.data.grid import to_pil

    for (column, row), wanted in alone.items():
        left = column * (32 + gap) + (32 - wanted.shape[2]) // 2
        top = row * (side + gap)
        part = picture.crop((left, top, left + wanted.shape[2], top + 16))
        difference = torch.tensor(list(part.tobytes())).float() - torch.tensor(list(to_pil(wanted[None])[0].tobytes()))
        assert difference.abs().max() <= 2, (column, row)
    assert SETTINGS["steps"] == common.steps


def test_a_lora_keeps_the_models_answers_to_the_class(project: Path) -> None:
    """In training the term is logged; the tuned model answers to the class's word nearer to the base with it."""
    task: dict[str, Any] = {
        "kind": "dreambooth", "images": str(project / "subject"), "identifier": "sks", "noun": "cross",
        "prior": None, "adapter": {"kind": "lora", "rank": 2},
    }  # fmt: skip
    drawn = {}
    for name, preserve in (("free", None), ("kept", {"kind": "class", "weight": 100.0})):
        tree = config(project, f"preserve-{name}", task | {"preserve": preserve}, steps=6)
        assert train(tree) == 0
        told: Any = decode(RunConfig, tree).task
        drawn[name] = TextToImage.load(project / f"preserve-{name}").sample(["a cross"], settings=told.samples.settings)
        drawn["base"] = TextToImage.load(project / "teacher").sample(["a cross"], settings=told.samples.settings)
    far, near = ((drawn[name] - drawn["base"]).norm() for name in ("free", "kept"))
    assert near < 0.7 * far
    text = (project / "preserve-kept" / "log" / "metrics.jsonl").read_text()
    assert "loss_preserved" in text
    full = task | {"adapter": {"kind": "full"}, "preserve": {"kind": "blank"}}
    with pytest.raises(ValueError, match=r"task\.preserve: needs a LoRA"):
        train(config(project, "preserve-full", full, steps=1))


def test_two_processes_tell_the_same_loss_before_the_first_step(project: Path) -> None:
    """The held-out samples have noise and times of their own, whoever has them."""
    found = []
    for world in (1, 2):
        tree = config(project, f"world-{world}", lora(project), steps=1, batch=2,
                      validate={"share": 0.4, "every": 1, "samples": 4, "times": 4})  # fmt: skip
        tree["data"]["last"] = "wrap"
        assert ranks.run(train, world, tree, timeout=400) == [0] * world
        found.append(losses(project / f"world-{world}")[0])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
