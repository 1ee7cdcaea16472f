"""Training verbs on SD3, FLUX.1 and PixArt, tiny and random: the same tests over the families."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.checkpoint.convert import save_diffusers
from ldm.cli.__main__ import main
from ldm.config.load import encode
from ldm.pipeline import TextToImage
from tests import miniature, ranks
from tests.families import make, network_config
from tests.parity.test_transformer_pipelines import CLASSES, DYNAMIC, close, drawn

torch.set_num_threads(1)
KINDS = ("sd3", "flux", "pixart")
STEPS = {"steps": 8, "guidance": {"sd3": 5.0, "flux": 3.5, "pixart": 4.5}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, three captioned pictures, and a folder of each family; FLUX.1's shift grows with the picture."""
    folder = tmp_path_factory.mktemp("transformers")
    miniature.data(folder / "data")
    miniature.crosses(folder / "subject")
    for kind in KINDS:
        parts = make(kind, folder / "t5" / kind)
        scheduler = DYNAMIC if kind == "flux" else parts.scheduler
        own = {"network": parts.network, "autoencoder": parts.autoencoder, "text": parts.text}
        save_diffusers(folder / kind, scheduler=scheduler, **own)  # type: ignore[arg-type]
    return folder


def config(root: Path, kind: str, out: str, **task: Any) -> Path:
    """A config of `ldm train` from random weights, written."""
    flow = {"schedule": {"kind": "flow", "shift": 3.0}, "prediction": {"kind": "velocity"}}
    own = {
        "vae": str(root / kind),
        "text": str(root / kind),
        "network": encode(network_config(kind)),
        "process": {"variance": "learned"} if kind == "pixart" else flow | {"density": {"kind": "logit_normal"}},
        "cache": str(root / f"cache-{kind}"),
        "samples": {"prompts": ["a red dot"], "every": 4, "settings": {"steps": 2, "guidance": 2.0}},
    }
    made = miniature.text_to_image(root) | {"out": str(root / out), "train": miniature.train(steps=4)}
    made["task"] = {"kind": "text_to_image"} | own | task
    return miniature.write(made, root / f"{out}.yaml")


def losses(run: Path) -> list[float]:
    """Of each step; of one that was taken twice, the last."""
    rows = [json.loads(line) for line in (run / "log" / "metrics.jsonl").read_text().splitlines()]
    return [loss for _, loss in sorted({row["step"]: row["loss"] for row in rows}.items())]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(next((folder / "transformer").glob("*.safetensors")))


def theirs(kind: str, folder: Path) -> Any:
    """diffusers' pipeline of a folder."""
    import diffusers

    pipe = getattr(diffusers, CLASSES[kind]).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(kind: str, ours: TextToImage, pipe: Any, base: TextToImage | None = None) -> None:
    """Their picture is ours, and not that of `base`."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    guidance = STEPS["guidance"][kind]
    more: dict[str, Any] = {"guidance_scale": guidance, "num_inference_steps": STEPS["steps"], "output_type": "pt"}
    given = noise
    if kind == "flux":
        given, more = pipe._pack_latents(noise, 1, 4, 8, 8), more | {"max_sequence_length": 512}
    else:
        more |= {"negative_prompt": ""}
    if kind == "pixart":
        more |= {"clean_caption": False, "use_resolution_binning": False}
    wanted = pipe("a red apple", latents=given, height=16, width=16, **more).images
    chosen = {"guidance": guidance} | ({"sampler": "dpmpp_2m"} if kind == "pixart" else {})
    own = drawn(ours, noise, (16, 16), **chosen)
    close(own, wanted)
    if base is not None:
        assert (drawn(base, noise, (16, 16), **chosen) - own).abs().max() > 5e-3


def quiet(argv: list[str]) -> tuple[int, str]:
    """The code of a verb and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(argv)
    return code, said.getvalue()


def command(argv: list[str]) -> int:
    """A verb in a rank of its own."""
    torch.use_deterministic_algorithms(True)
    return quiet(argv)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_training_resumes_exactly_and_its_export_trains_further(kind: str, root: Path) -> None:
    run, again = root / f"run-{kind}", root / f"again-{kind}"
    path = config(root, kind, run.name)
    assert quiet(["train", str(path)])[0] == 0
    assert quiet(["export", f"{run}@2", str(root / f"two-{kind}")])[0] == 0
    shutil.copytree(run, again)
    for name in ("checkpoints/step-4", "export"):
        shutil.rmtree(again / name)
    (again / "done.json").unlink()
    assert quiet(["train", str(path), f"out={again}"])[0] == 0
    assert losses(again) == losses(run)
    ours, wanted = weights(again / "export"), weights(run / "export")
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert any(not torch.equal(wanted[k], v) for k, v in weights(root / f"two-{kind}").items())
    further = config(root, kind, f"further-{kind}", network=None, start=str(run / "export"))
    assert quiet(["train", str(further), "train.steps=1", "task.samples.prompts=[]"])[0] == 0
    code, said = quiet(["plan", str(path), "--gpu", "a100-80g"])
    assert code == 0, said


FIRST = [KINDS[0], *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])]


@pytest.mark.parametrize("kind", FIRST)
def test_every_stage_and_recomputing_blocks_give_the_same_losses(kind: str, root: Path) -> None:
    """ZeRO 0, 1 and 3 on two ranks against ZeRO 2 on one; blocks computed again there."""
    plain = config(root, kind, f"plain-{kind}")
    few = ["train.steps=3", "task.samples.prompts=[]"]
    assert quiet(["train", str(plain), *few])[0] == 0
    wanted = losses(root / f"plain-{kind}")
    for stage in (0, 1, 3):
        out = root / f"stage-{stage}-{kind}"
        more = [f"out={out}", f"train.engine.zero_stage={stage}", "task.gradient_checkpointing=block"]
        assert ranks.run(command, 2, ["train", str(plain), *few, *more], timeout=300) == [0, 0]
        assert losses(out) == pytest.approx(wanted, rel=2e-5)
    ours, alone = weights(root / f"stage-3-{kind}" / "export"), weights(root / f"plain-{kind}" / "export")
    assert all(torch.allclose(ours[k], v, rtol=0, atol=2e-3) for k, v in alone.items())
    code, said = quiet(["train", str(plain), f"out={root / 'no'}", "task.gradient_checkpointing=transformer"])
    assert code == 2
    assert "gradient_checkpointing 'transformer' is not one of ['block', 'none']" in said


@pytest.mark.parametrize("kind", FIRST)
def test_a_signal_saves_and_the_run_goes_on(kind: str, root: Path) -> None:
    name = f"stopped-{kind}"
    path = config(root, kind, name, cache=None, samples={"prompts": [], "every": 0})
    run = [sys.executable, "-m", "ldm.cli", "train", str(path), "train.steps=60", "train.checkpoint.every=60"]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    miniature.stop_after_two_steps(process, root / name)
    said = process.communicate(timeout=120)[0]
    saved = sorted((root / name / "checkpoints").glob("step-*"))
    assert len(saved) == 1, said
    step = int(saved[0].name.removeprefix("step-"))
    assert 2 <= step < 60
    assert quiet(["train", str(path), f"train.steps={step + 1}", "train.checkpoint.every=60"])[0] == 0


def tune(root: Path, kind: str, name: str, method: str, *options: str, steps: int = 2) -> Path:
    out = root / f"{name}-{kind}"
    given = ["--images", root / "subject", "--base", root / kind, "--out", out, "--steps", steps, "--size", 16]
    sets = ("train.log.tensorboard=false", "task.samples.prompts=[]", "train.threads=1")
    words = [*map(str, given), *(w for s in sets for w in ("--set", s)), "--precision", "fp32"]
    code, said = quiet(["finetune", method, *words, *options])
    assert code == 0, said
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_folders_encode_data_and_are_measured(kind: str, root: Path) -> None:
    """What is encoded beforehand trains; likelihoods and inversion are finite."""
    out, model = root / f"encoded-{kind}", ["--model", str(root / kind), "--data", str(root / "data"), "--count", "2"]
    parts = ["--vae", str(root / kind), "--text", str(root / kind), "--size", "16"]
    code, said = quiet(["data", "encode", str(root / "data"), str(out), *parts])
    assert code == 0, said
    few = [f"data.path={out}", "data.cached=true", "task.cache=null", "task.samples.prompts=[]", "train.steps=1"]
    code, said = quiet(["train", str(config(root, kind, f"from-{kind}")), *few])
    assert code == 0, said
    # FLUX.1's tiny shift is beyond all bounds at the tokens of its usual pictures, which are measured
    for name in ("nll", "inversion") if kind != "flux" else ():
        file = root / f"{name}-{kind}.json"
        code, said = quiet(["evaluate", name, *model, "--steps", "3", "--out", str(file)])
        assert code == 0, said
        assert "NaN" not in file.read_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_draws_the_same_in_diffusers(kind: str, dora: bool, root: Path) -> None:
    """DoRA's is drawn through PEFT too; it trains without a cache."""
    options = ("--dora", "--no-cache") if dora else ()
    out = tune(root, kind, f"lora-{dora}", "lora", "--lr", "3e-2", *options, steps=4)
    pipe = theirs(kind, root / kind)
    if kind == "pixart":  # its pipeline reads no LoRA, PEFT does
        pytest.skip("PixArt's pipeline in diffusers has no load_lora_weights")
    pipe.load_lora_weights(out / "export")
    same(kind, TextToImage.load(out), pipe, TextToImage.load(root / kind))
    assert (out / "export" / "kohya.safetensors").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_whole_weights_keep_the_bases_scheduler(kind: str, root: Path) -> None:
    """DreamBooth with class pictures that are there, and the text encoders trained."""
    prior = ("--num-class-images", "3", "--class-data-dir", str(root / "data"))
    options = ("--class", "cross", "--lr", "5e-3", "--train-text-encoder", *prior)
    out = tune(root, kind, "full", "dreambooth", *options)
    told = [json.loads((f / "scheduler" / "scheduler_config.json").read_text()) for f in (root / kind, out / "export")]
    assert told[0] == told[1]
    same(kind, TextToImage.load(out), theirs(kind, out / "export"), TextToImage.load(root / kind))


@pytest.mark.parametrize(("kind", "names"), [("sd3", ["clip_g", "clip_l", "t5xxl"]), ("flux", ["clip_l", "t5xxl"])])
def test_new_tokens_are_learned_by_every_encoder(kind: str, names: list[str], root: Path) -> None:
    out = tune(root, kind, "token", "textual-inversion", "--token", "<new>")
    (path,) = (out / "export" / "a1111").glob("*.safetensors")
    assert sorted(load_file(path)) == names
    pipe = TextToImage.load(out)
    assert all("<new>" in encoder.tokenizer.added for encoder in pipe.text)


METHODS: dict[str, dict[str, Any]] = {
    "lcm": {"kind": "lcm", "solver_steps": 10},
    "dmd": {"kind": "dmd", "solver_steps": 10, "steps": [2], "every": 1, "adversarial": 0.1, "judge": "patches"},
}


def distill(root: Path, kind: str, method: dict[str, Any], out: str, **task: Any) -> tuple[int, str]:
    made = miniature.distill(root, method, teacher=str(root / kind), guidance_embedding=None)
    made |= {"out": str(root / out), "train": miniature.train(steps=3, checkpoint={"every": 3})}
    made["task"] |= {"samples": {"prompts": [], "every": 0}} | task
    return quiet(["distill", method["kind"], str(miniature.write(made, root / f"{out}.yaml"))])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*METHODS, "lora"])
def test_students_of_every_family(kind: str, name: str, root: Path) -> None:
    """Losses are finite; the student's folder tells its sampler, and draws."""
    lora = {"lora": {"rank": 2}} if name == "lora" else {}
    method = METHODS["lcm"] | {"w": [2.0, 2.0]} if name == "lora" else METHODS[name]
    code, said = distill(root, kind, method, f"{name}-student-{kind}", **lora)
    assert code == 0, said
    run = root / f"{name}-student-{kind}"
    assert torch.tensor(losses(run)).isfinite().all()
    place = run / "export" / ("" if lora else "scheduler") / "scheduler_config.json"
    assert json.loads(place.read_text())["_class_name"] == ("LCM" if kind == "pixart" else "FlowMatchLCM") + "Scheduler"
    pipe = TextToImage.load(run)
    assert pipe.student is not None
    assert pipe.student.sampler == "lcm"


@pytest.mark.parametrize(
    ("method", "task", "said"),
    [
        ({"kind": "tcd", "solver_steps": 10}, {}, "'tcd', but its sampler in diffusers knows no flow"),
        (METHODS["dmd"] | {"judge": "middle"}, {}, "method.judge: 'middle'"),
        (METHODS["lcm"], {"guidance_embedding": 32}, "write null"),
    ],
)
def test_what_a_flow_cannot_be_made_into_is_one_line(
    method: dict[str, Any], task: dict[str, Any], said: str, root: Path
) -> None:
    code, told = distill(root, "sd3", method, "refused", **task)
    assert code == 2
    assert said in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["task.text=" + "{root}/pixart"], "task.network"),
        (["task.network.in_channels=16", "task.network.out_channels=16"], "channels"),
        (["data.size=18"], "data.size"),
        (["task.network.kind=dit"], "dit"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(changes: list[str], said: str, root: Path) -> None:
    path = config(root, "sd3", "unfit", cache=None)
    code, told = quiet(["train", str(path), *(c.format(root=root) for c in changes)])
    assert code == 2, told
    assert said in told
    assert "Traceback" not in told
