"""Few-step students of SD3, FLUX.1 and PixArt, tiny: losses fall, and they are drawn by our sampler and diffusers'."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.students import choose
from ldm.config.schema import load_run
from ldm.pipeline import Settings, TextToImage
from ldm.recipes.distill import DistillTask, build
from ldm.rng import Rng, seed_torch
from tests import miniature
from tests.families import make
from tests.integration.test_transformer_training import quiet, theirs
from tests.parity.test_transformer_pipelines import DYNAMIC

torch.set_num_threads(1)
KINDS = ("sd3", "flux", "pixart")
PROMPT, SHAPE = "a red apple", (4, 8, 8)
CLASSES = {  # of the exported schedulers
    "lcm": {"sd3": "FlowMatchLCMScheduler", "flux": "FlowMatchLCMScheduler", "pixart": "LCMScheduler"},
    "progressive": {
        "sd3": "DPMSolverMultistepScheduler", "flux": "FlowMatchEulerDiscreteScheduler", "pixart": "DDIMScheduler",
    },
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "lcm": {"kind": "lcm", "solver_steps": 10, "w": [1.0, 1.0]},
    "lora": {"kind": "lcm", "solver_steps": 10, "w": [1.0, 1.0]},
    "dmd": {"kind": "dmd", "solver_steps": 10, "steps": [2], "every": 1, "w": [1.0, 1.0]},
    "progressive": {"kind": "progressive", "steps": 4, "until": 2, "w": [1.0, 1.0]},
}


def cases(*names: str, quick: set[str]) -> list[Any]:
    """All families and methods; what is not quick is slow."""
    return [
        pytest.param(kind, name, marks=() if f"{kind}-{name}" in quick else pytest.mark.slow)
        for kind in KINDS
        for name in names
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of two pictures, and a folder of each family, of networks that are not too wild to be followed."""
    folder = tmp_path_factory.mktemp("students")
    miniature.data(folder / "data")
    for kind in KINDS:
        parts = make(kind, folder / "t5" / kind)
        for name, weight in parts.network.named_parameters():
            if weight.ndim > 1 and "norm" not in name:
                weight.data *= 0.5
        scheduler = DYNAMIC if kind == "flux" else parts.scheduler
        own = {"network": parts.network, "autoencoder": parts.autoencoder, "text": parts.text}
        save_diffusers(folder / kind, scheduler=scheduler, **own)  # type: ignore[arg-type]
    return folder


def written(root: Path, kind: str, name: str, steps: int, **task: Any) -> Path:
    """The config of a distillation."""
    method = METHODS[name] | task.pop("method", {})
    out = root / f"{name}-{kind}-{steps}"
    lora = {"lora": {"rank": 4}} if name == "lora" else {}
    made = miniature.distill(root, method, teacher=str(root / kind), guidance_embedding=None)
    optim = {"lr": 3.0e-2 if name == "lora" else 2.0e-3, "warmup": 2}
    made |= {"out": str(out), "train": miniature.train(steps=steps, checkpoint={"every": steps}, optim=optim)}
    made["task"] |= {"samples": {"prompts": [], "every": 0}, "cache": str(root / f"cache-{kind}")} | lora | task
    return miniature.write(made, root / f"{out.name}.yaml")


def distil(root: Path, kind: str, name: str, steps: int) -> Path:
    """A distillation by its command; its run's folder."""
    path = written(root, kind, name, steps)
    code, said = quiet(["distill", METHODS[name]["kind"], str(path)])
    assert code == 0, said
    return path.with_suffix("")


def ours(model: Path, **asked: Any) -> tuple[Tensor, Settings]:
    """What `ldm sample` draws of a prompt where nothing else is asked for, (1, 3, H, W) in [0, 1]."""
    pipe = TextToImage.load(model)
    sampler, steps, guidance = choose(pipe.student, None, asked.get("steps"), asked.get("guidance"), pipe.habit)
    settings = Settings(sampler=sampler, steps=steps, guidance=guidance, seed=4, size=(16, 16))
    return pipe.sample([PROMPT], settings=settings) / 2 + 0.5, settings


def diffusers_draw(
    kind: str, pipe: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch, sigmas: bool = False
) -> Tensor:
    """diffusers' picture from our noise: the start and, step by step, that of its random scheduler."""
    rng, steps = Rng(4, (0,)), iter(range(100))
    for module in ("scheduling_lcm", "scheduling_flow_match_lcm"):
        monkeypatch.setattr(
            f"diffusers.schedulers.{module}.randn_tensor",
            lambda *_, **__: packed(kind, pipe, rng.normal(f"step {next(steps)}", SHAPE)),
        )
    told: dict[str, Any] = {"num_inference_steps": settings.steps}
    if sigmas:
        told["sigmas"] = [1 - i / settings.steps for i in range(settings.steps)]
    if kind == "flux":
        told["max_sequence_length"] = 512
    if kind == "pixart":
        told |= {"clean_caption": False, "use_resolution_binning": False}
    start = packed(kind, pipe, rng.normal("start", SHAPE))
    return pipe(
        PROMPT, latents=start, height=16, width=16, guidance_scale=settings.guidance, output_type="pt", **told
    ).images


def packed(kind: str, pipe: Any, noise: Tensor) -> Tensor:
    return pipe._pack_latents(noise, 1, *SHAPE) if kind == "flux" else noise


def of_base(kind: str, root: Path, export: Path) -> Any:
    """diffusers' pipeline of a LoRA's base with the student's scheduler and corrections."""
    import diffusers

    pipe = theirs(kind, root / kind)
    cls = json.loads((export / "scheduler_config.json").read_text())["_class_name"]
    pipe.scheduler = getattr(diffusers, cls).from_pretrained(export)
    pipe.load_lora_weights(export)
    return pipe


@pytest.mark.parametrize(("kind", "name"), cases("lcm", "lora", "progressive", quick={"sd3-progressive", "flux-lora"}))
def test_students_are_drawn_as_diffusers_draws_them(
    kind: str, name: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their own sampler, times and steps, with guidance inside (FLUX.1 is told it)."""
    run = distil(root, kind, name, 2)
    export = run / "export"
    place = export / ("" if name == "lora" else "scheduler") / "scheduler_config.json"
    told = json.loads(place.read_text())
    assert told["_class_name"] == CLASSES["lcm" if name == "lora" else name][kind]
    picture, settings = ours(run)
    if name == "progressive":
        assert (told["_few_steps"], settings.steps) == (2, 2)
        expected = {"sd3": "dpm_solver_1", "flux": "euler", "pixart": "ddim"}[kind]
    else:
        assert settings.steps == 4
        expected = "lcm"
    assert (settings.sampler, settings.guidance) == (expected, 3.5 if kind == "flux" else 1.0)
    if name == "lora" and kind == "pixart":
        return  # its pipeline in diffusers reads no LoRA
    pipe = of_base(kind, root, export) if name == "lora" else theirs(kind, export)
    # SD3's pipeline takes the scheduler's own sigmas, which end near the data: a step less
    wanted = diffusers_draw(kind, pipe, settings, monkeypatch, sigmas=kind == "sd3" and name != "progressive")
    assert wanted.std() > 0.01
    torch.testing.assert_close(picture, wanted.float(), rtol=0, atol=1e-3)
    base = TextToImage.load(root / kind).sample([PROMPT], settings=settings) / 2 + 0.5
    assert float((base - picture).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("kind", "name"), cases("lcm", "lora", "progressive", "dmd", quick={"flux-progressive", "pixart-dmd", "sd3-lcm"})
)
def test_losses_fall(kind: str, name: str, root: Path) -> None:
    """Two dozen steps on one batch with one draw of noise.

    Of DMD the critic's, on a student that waits: what the student follows is a direction, and no loss that falls. An
    epsilon teacher is matched by a student of v, the first round of its progressive distillation.
    """
    methods = {"progressive": {"until": 4}, "dmd": {"alone": 1000}}
    changes: dict[str, Any] = {"method": methods.get(name, {})}
    if name == "progressive" and kind == "pixart":
        changes = {"method": {"stage": "match"}, "prediction": "v"}
    path = written(root, kind, name, 24, **changes)
    config = load_run(str(path), [])
    assert isinstance(config.task, DistillTask)
    seed_torch(0)
    built = build(config.task, config.data, config.train, 0, 0)
    batch = next(built.loader.batches(0))
    objective = built.objective.train()
    optimizer = torch.optim.Adam([p for p in objective.trained.parameters() if p.requires_grad], lr=4e-3)
    found = []
    for step in range(24):
        loss, metrics = objective(batch, Rng(7, tuple(range(len(batch["weight"])))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(step + 1)
        found.append(float(metrics["critic"] if name == "dmd" else loss))
    first, last = found[0], sum(found[-4:]) / 4
    print(f"{name} {kind}: {first:.4g} -> {last:.4g}")
    assert all(map(math.isfinite, found))
    assert last < 0.7 * first
