"""Distillation by its commands in miniature; the students in diffusers' own pipelines, drawing what ours draw."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.cli.__main__ import main
from ldm.pipeline import Settings, TextToImage
from ldm.rng import Rng
from tests import miniature

SEED = 4
PROMPTS = ["a red dot", "a blue bar"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = miniature.project(tmp_path_factory.mktemp("distill"))
    miniature.teacher(root)
    return root


def config(root: Path, name: str, method: dict[str, Any], steps: int = 3, **task: Any) -> Path:
    made = miniature.distill(root, method, **task)
    made |= {"name": name, "out": str(root / name), "train": miniature.train(steps=steps)}
    return miniature.write(made, root / f"{name}.yaml")


def ours(model: Path, settings: Settings, lora: Path | None = None) -> Tensor:
    pipeline = TextToImage.load(model)
    if lora is not None:
        pipeline.load_lora(lora, name="second")  # both files have the same name
    return pipeline.sample(PROMPTS, settings=settings)


def theirs(pipe: Any, monkeypatch: pytest.MonkeyPatch, scheduler: str, settings: Settings, scale: float) -> Tensor:
    """diffusers' pictures from our noise: the start and, step by step, that of its random scheduler."""
    rng, shape = Rng(SEED, tuple(range(len(PROMPTS)))), (4, 8, 8)
    steps = iter(range(100))

    def noise(*_: Any, **__: Any) -> Tensor:
        return rng.normal(f"step {next(steps)}", shape)

    if scheduler:
        monkeypatch.setattr(f"diffusers.schedulers.{scheduler}.randn_tensor", noise)
    pipe.set_progress_bar_config(disable=True)
    latents = rng.normal("start", shape)
    out = pipe(PROMPTS, num_inference_steps=settings.steps, guidance_scale=scale, latents=latents, output_type="pt")
    return out.images * 2 - 1


def load(folder: Path) -> Any:
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)


def worst(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.std() > 0.05
    return float((a - b).abs().max())


def test_a_consistency_student_runs_in_diffusers_pipeline_told_its_guidance(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(root, "lcm", {"kind": "lcm"})
    assert main(["distill", "lcm", str(path)]) == 0
    assert main(["distill", "lcm", str(path)]) == 0  # finished: nothing to do
    pipe = load(root / "lcm" / "export")
    assert (type(pipe).__name__, type(pipe.scheduler).__name__) == ("LatentConsistencyModelPipeline", "LCMScheduler")
    assert pipe.unet.config.time_cond_proj_dim == 32
    for steps, scale in ((1, 3.0), (4, 3.0), (4, 8.0)):
        settings = Settings(sampler="lcm", steps=steps, guidance=scale, seed=SEED)
        drawn = ours(root / "lcm", settings)
        other = theirs(pipe, monkeypatch, "scheduling_lcm", settings, scale)
        assert worst(drawn, other) < 1e-3, (steps, scale)
    low, high = (ours(root / "lcm", Settings(sampler="lcm", steps=1, guidance=g, seed=SEED)) for g in (3.0, 8.0))
    assert float((high - low).abs().max()) > 0


def test_progressive_rounds_resume_anywhere_and_the_last_student_runs_in_diffusers(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(root, "progressive", {"kind": "progressive", "steps": 4, "until": 2})
    from ldm.recipes import run as loop

    real: Callable[..., int] = loop.run
    calls: list[str] = []

    def interrupted(*args: Any, **kwargs: Any) -> int:
        calls.append(args[2].name)
        if len(calls) == 2:
            return 75  # as after a signal
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "run", interrupted)
    assert main(["distill", "progressive", str(path)]) == 75
    assert main(["distill", "progressive", str(path)]) == 0
    assert calls == ["round-1-4", "round-2-2", "round-1-4", "round-2-2"]
    assert "already finished 3 steps" in capsys.readouterr().err
    told = json.loads((root / "progressive" / "export" / "trained.json").read_text())
    assert told["teacher"].endswith("round-1-4/export")
    settings = Settings(sampler="ddim", steps=2, guidance=2.0, seed=SEED)
    pipe = load(root / "progressive" / "export")
    assert (type(pipe).__name__, type(pipe.scheduler).__name__) == ("StableDiffusionPipeline", "DDIMScheduler")
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert worst(ours(root / "progressive", settings), theirs(pipe, monkeypatch, "", settings, 2.0)) < 1e-3


def test_an_epsilon_teacher_becomes_a_v_student_that_is_told_its_guidance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rounds of one command: the match to v, then two halvings, each from the one before."""
    root = miniature.project(tmp_path)
    miniature.teacher(root, "epsilon")
    path = config(root, "rounds", {"kind": "progressive", "steps": 4, "until": 2, "w": [0.0, 4.0]}, steps=2)
    assert main(["distill", "progressive", str(path), "train.optim.lr=0.02"]) == 0
    names = ["round-0-match", "round-1-4", "round-2-2"]
    told = [json.loads((root / "rounds" / n / "export" / "trained.json").read_text())["teacher"] for n in names]
    assert [Path(t).parts[-2:] for t in told[1:]] == [(n, "export") for n in names[:2]]
    assert Path(told[0]).name == "teacher"
    pipe = load(root / "rounds" / "export")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.unet.config.time_cond_proj_dim == 32
    assert float(pipe.unet.time_embedding.cond_proj.weight.abs().max()) > 0, "zero at the start; it has learned from w"
    calls: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    for scale in (1.5, 5.0):
        settings = Settings(sampler="ddim", steps=2, guidance=scale, seed=SEED)
        assert worst(ours(root / "rounds", settings), theirs(pipe, monkeypatch, "", settings, scale)) < 1e-3
    assert calls == [len(PROMPTS)] * 4, "no second forward for guidance"
    low, high = (ours(root / "rounds", Settings(sampler="ddim", steps=2, guidance=g, seed=SEED)) for g in (1.5, 5.0))
    assert float((high - low).abs().max()) > 0


def test_a_lora_is_a_model_by_itself_and_stacks_in_diffusers_with_peft(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"kind": "lora", "rank": 3, "targets": ["attention", "convolution", "time"]}
    task = {"guidance_embedding": None, "lora": lora}
    method = {"kind": "lcm", "w": [2.0, 2.0], "solver_steps": 6}  # trained at 6 times, three of which are asked at
    paths = [config(root, n, method, steps=s, **task) for n, s in (("one", 3), ("two", 5))]
    for path in paths:
        assert main(["distill", "lcm", str(path), "train.optim.lr=0.05"]) == 0
    settings = Settings(sampler="lcm", steps=3, guidance=1.0, seed=SEED)
    files = [root / n / "export" / "pytorch_lora_weights.safetensors" for n in ("one", "two")]
    plain = ours(root / "teacher", settings)
    single, both = ours(root / "one", settings), ours(root / "one", settings, lora=files[1])
    assert worst(single, plain) > 1e-2
    assert worst(both, single) > 1e-2
    import diffusers

    pipe = load(root / "teacher")
    scheduler = json.loads((root / "one" / "export" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "LCMScheduler"
    pipe.scheduler = diffusers.LCMScheduler.from_config(scheduler)
    for i, (file, want) in enumerate(zip(files, (single, both), strict=True)):
        pipe.load_lora_weights(file, adapter_name=f"lora{i}")
        pipe.set_adapters([f"lora{j}" for j in range(i + 1)])
        assert worst(want, theirs(pipe, monkeypatch, "scheduling_lcm", settings, 1.0)) < 1e-3


def test_matching_goes_on_from_a_lora_and_exports_nothing_of_its_critic(root: Path) -> None:
    """At a rate of nothing its file is the one that it starts from; stopped and resumed it ends as in one go."""
    from safetensors.torch import load_file

    task = {"guidance_embedding": None, "lora": {"kind": "lora", "rank": 2, "targets": ["attention", "time"]}}
    path = config(root, "first", {"kind": "lcm", "w": [1.0, 1.0], "solver_steps": 8}, **task)
    assert main(["distill", "lcm", str(path), "train.optim.lr=0.05"]) == 0
    dmd = {"kind": "dmd", "w": [1.0, 1.0], "steps": [1, 2, 4], "solver_steps": 8, "every": 2, "adversarial": 0.01}
    name, found = "export/pytorch_lora_weights.safetensors", {}
    for run, rate in (("still", "1e-12"), ("moved", "0.01"), ("stopped", "0.01")):
        path = config(root, run, dmd, steps=4, start=str(root / "first"), **task)
        options = [f"train.optim.lr={rate}", "train.optim.warmup=0", "train.optim.decay=constant"]
        if run == "stopped":
            assert main(["distill", "dmd", str(path), *options, "train.steps=2"]) == 0
        assert main(["distill", "dmd", str(path), *options]) == 0
        found[run] = load_file(root / run / name)
    first = load_file(root / "first" / name)
    assert found["still"].keys() == first.keys()
    assert all(torch.allclose(found["still"][k], first[k], atol=1e-6) for k in first)
    assert any(not torch.allclose(found["moved"][k], first[k], atol=1e-3) for k in first)
    assert all(torch.equal(found["stopped"][k], found["moved"][k]) for k in first)
    scheduler = json.loads((root / "moved" / "export" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["original_inference_steps"]) == ("LCMScheduler", 8)
    assert (
        TextToImage.load(root / "moved").sample(PROMPTS, settings=Settings(sampler="lcm", steps=4, guidance=1.0)).std()
        > 0
    )


def test_the_command_draws_with_a_lora_as_it_was_trained_unless_told_otherwise(root: Path, tmp_path: Path) -> None:
    """Sampler, steps, guidance and times of the student by itself; what is given is taken."""
    from PIL import Image

    task = {"guidance_embedding": None, "lora": {"kind": "lora", "rank": 2, "targets": ["attention"]}}
    path = config(root, "plain", {"kind": "lcm", "w": [2.0, 2.0], "solver_steps": 8}, steps=2, **task)
    assert main(["distill", "lcm", str(path)]) == 0
    for name, options in (("own", []), ("given", ["--sampler", "ddim", "--steps", "3", "--guidance", "2"])):
        argv = ["sample", "a red dot", "--model", str(root / "plain"), "--out", str(tmp_path / name), *options]
        assert main(argv) == 0
    told = {n: json.loads(Image.open(tmp_path / n / "grid.png").text["ldm"]) for n in ("own", "given")}  # type: ignore[attr-defined]
    chosen = {n: (t["sampler"], t["steps"], t["guidance"]) for n, t in told.items()}
    assert chosen == {"own": ("lcm", 4, 1.0), "given": ("ddim", 3, 2.0)}


def test_the_command_line_draws_with_a_student(root: Path, tmp_path: Path) -> None:
    path = config(root, "tcd", {"kind": "tcd"}, steps=2)
    assert main(["distill", "tcd", str(path)]) == 0
    options = ["--model", str(root / "tcd"), "--sampler", "tcd", "--steps", "2", "--out", str(tmp_path)]
    assert main(["sample", "a red dot", *options]) == 0
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.parametrize(
    ("method", "task", "told"),
    [
        ("progressive", {}, "is not 'progressive'"),
        ("lcm", {"lora": {"kind": "lora"}}, "guidance_embedding: a LoRA has none"),
        ("lcm", {"prediction": "v"}, "needs method progressive with stage match"),
    ],
)
def test_mistakes_are_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], method: str, task: dict[str, Any], told: str
) -> None:
    path = config(root, "wrong", {"kind": "lcm"}, **task)
    assert main(["distill", method, str(path)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
