"""Jobs that recipes tell the planner, counted from their losses: weights, frozen parts, operations, real peaks."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_tensors

from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.schedulers import scheduler_to_diffusers
from ldm.cli.__main__ import main
from ldm.config.load import decode
from ldm.config.schema import RunConfig, load_run
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.schedule import Discrete
from ldm.models.fit import told
from ldm.models.text import build_clip
from ldm.models.unet import UNet, UNetConfig
from ldm.models.unet.controlnet import ControlNet
from ldm.pipeline import TextToImage
from ldm.plan import rounds
from ldm.plan.flops import count_flops
from ldm.plan.hardware import find
from ldm.plan.memory import memory
from ldm.plan.report import Job, Plan, Planner
from ldm.plan.throughput import Cluster
from ldm.recipes import RECIPES, Task, assemble, plan_job
from ldm.recipes.dreambooth import DreamboothTask
from ldm.recipes.planned import Asked
from ldm.recipes.sources import load_autoencoder, load_towers
from tests import miniature, ranks
from tests.unit.plan import work

UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(64, 128),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=16,
    attention_head_dim=2,
)
MICRO = 8
LORA = {"kind": "lora", "rank": 4}
LCM = {"kind": "lcm", "w": [2.0, 8.0], "decay": 0.9}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a base model wide enough that its activations are most of what it takes."""
    root = miniature.project(tmp_path_factory.mktemp("project"))
    torch.manual_seed(0)
    save_diffusers(
        root / "teacher",
        network=UNet(UNET),
        autoencoder=load_autoencoder(str(root / "autoencoder")),
        text=load_towers(str(root / "towers")),
        scheduler=scheduler_to_diffusers(Discrete(), PREDICTIONS["epsilon"]),
    )
    return root


def config(root: Path, kind: str) -> Path:
    """A config of one kind of task below `root`; batch MICRO on one rank."""
    if kind == "clip":
        tree = miniature.contrastive(root)
    elif kind.startswith("distill"):
        lora = kind == "distill lora"
        changes = {"lora": LORA, "guidance_embedding": None} if lora else {}
        tree = miniature.distill(root, LCM, **changes)
    elif kind.startswith("dreambooth"):
        tree = subject(root, LORA if kind == "dreambooth lora" else {"kind": "full"})
    elif kind == "inversion":
        tree = words(root)
    elif kind in ("controlnet", "ip_adapter"):
        tree = told_a_picture(root, kind)
    else:
        adapter = LORA if kind == "lora" else {"kind": "full", "text": kind == "full with text"}
        task = {"kind": "finetune", "base": str(root / "teacher"), "adapter": adapter}
        tree = {**miniature.contrastive(root), "task": task}
    tree["train"]["batch"] = MICRO
    tree["train"]["engine"] = {"zero_stage": 1, "precision": "fp32", "bucket": work.BUCKET}
    return miniature.write(tree, root / f"{kind.replace(' ', '-')}.yaml")


def told_a_picture(root: Path, kind: str) -> dict[str, Any]:
    """Training beside the base, which stays as it is; both log their sensitivity at every step."""
    task: dict[str, Any] = {"kind": kind, "base": str(root / "teacher"), "samples": {"every": 0}, "sensitivity": 1}
    task |= {"image_encoder": str(root / "towers")} if kind == "ip_adapter" else {}
    tree = {**miniature.contrastive(root), "task": task}
    tree["train"]["log"] = {"every": 1}
    if kind == "controlnet":
        tree["data"] = {**tree["data"], "pairs": {"condition": {"kind": "canny"}}}
    return tree


def pictures(folder: Path, count: int) -> Path:
    """Different pictures without captions."""
    folder.mkdir(exist_ok=True)
    for i, shape in enumerate(miniature.SHAPES[:count]):
        (folder / f"{i}.png").write_bytes(miniature.picture("red", shape))
    return folder


def subject(root: Path, adapter: dict[str, Any]) -> dict[str, Any]:
    """DreamBooth on three pictures, and four of the class, which the base draws in three guided steps each."""
    name = adapter["kind"]
    task = {
        "kind": "dreambooth", "base": str(root / "teacher"), "images": str(pictures(root / "subject", 3)),
        "noun": "dot", "adapter": adapter, "cache": str(root / f"cache-{name}"),
        "prior": {"count": 4, "settings": {"sampler": "dpmpp_2m", "steps": 3, "guidance": 2.0, "batch": 2}},
    }  # fmt: skip
    shards = [str(root / f"shards-{name}" / part) for part in ("subject", "class")]
    sources = [{"data": {"path": path, "size": miniature.SIZE, "last": "wrap"}} for path in shards]
    return {**miniature.contrastive(root), "task": task, "data": {"kind": "mixture", "sources": sources}}


def words(root: Path) -> dict[str, Any]:
    """Textual inversion of one word of two vectors."""
    concept = {"token": "<a>", "vectors": 2, "images": str(pictures(root / "subject", 3))}
    task = {
        "kind": "textual_inversion", "base": str(root / "teacher"), "concepts": [concept],
        "cache": str(root / "cache-words"),
    }  # fmt: skip
    data = {"path": str(root / "shards-words"), "size": miniature.SIZE, "last": "wrap"}
    tree = {**miniature.contrastive(root), "task": task, "data": data}
    tree["train"]["optim"]["weight_decay"] = 0.0
    return tree


@pytest.fixture
def plan(root: Path) -> Callable[[str], Plan]:
    def made(kind: str) -> Plan:
        cluster = Cluster(nodes=1, per_node=1, hardware=find("a100-80g"))
        return Planner(job_of(load_run(config(root, kind)), 1, gpu=True), cluster, recomputing=(False,)).plan()

    return made


def job_of(run: RunConfig, world: int, *, gpu: bool) -> Job:
    return plan_job(run.task, run.data, run.train, Asked(name=run.name, world=world, gpu=gpu))


def numbers(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_fine_tuning_by_lora_holds_the_base_once_and_trains_its_corrections(plan: Any) -> None:
    unet, found = UNet(UNET), plan("lora")
    layers = [m for n, m in unet.named_modules() if ".attn" in n and isinstance(m, torch.nn.Linear)]
    assert found.weights == sum(4 * (m.in_features + m.out_features) for m in layers)
    assert found.chosen.parts.frozen >= 4 * numbers(unet)
    assert found.chosen.parts.optimizer == 8 * found.weights  # two moments; the weights are the masters
    forward = count_flops(unet, torch.zeros(1, 4, 8, 8), torch.zeros(1), {"text": torch.zeros(1, 12, 16)})
    assert 1.8 * forward < found.flops_per_image < 2.4 * forward  # no gradients of the base's weights


def test_full_fine_tuning_trains_all_and_the_towers_if_so_configured(plan: Any, root: Path) -> None:
    unet, alone, both = UNet(UNET), plan("full"), plan("full with text")
    assert alone.weights == numbers(unet)
    tower = load_towers(str(root / "towers"))[0]
    assert both.weights == numbers(unet) + numbers(tower.model) - tower.model.text_projection.numel()
    forward = count_flops(unet, torch.zeros(1, 4, 8, 8), torch.zeros(1), {"text": torch.zeros(1, 12, 16)})
    assert alone.flops_per_image == pytest.approx(3 * forward, rel=0.1)
    assert both.flops_per_image > alone.flops_per_image
    assert alone.chosen.parts.frozen == both.chosen.parts.frozen > 4 * numbers(tower)  # copies draw the samples


def test_distillation_counts_teacher_and_target(plan: Any) -> None:
    """Student forward and backward 3, guided teacher 2, target 1, in forward passes of the U-Net."""
    unet, found = UNet(UNET), plan("distill")
    student = numbers(unet) + 32 * 64  # the projection of w
    assert found.weights == student
    assert found.chosen.parts.frozen >= 4 * (numbers(unet) + student)
    forward = count_flops(unet, torch.zeros(1, 4, 8, 8), torch.zeros(1), {"text": torch.zeros(1, 12, 16)})
    assert found.flops_per_image == pytest.approx(6 * forward, rel=0.1)
    lora = plan("distill lora")
    assert lora.weights < student / 5
    assert 4 * numbers(unet) < lora.chosen.parts.frozen < found.chosen.parts.frozen


def test_clip_is_both_towers(plan: Any) -> None:
    assert plan("clip").weights == numbers(build_clip(miniature.CLIP))


def test_the_table_of_recipes_has_every_kind_of_task() -> None:
    assert set(RECIPES) == set(get_args(Task))
    assert all(callable(recipe.build) and callable(recipe.job) for recipe in RECIPES.values())


@pytest.mark.parametrize(
    ("prediction", "width", "first", "passes"),
    [
        # the student's forward and backward are 3, a guided answer of the teacher 2; a halving asks it twice
        ("epsilon", 32, "round-0-match", (3 + 2, 3 + 2)),
        ("v", 32, "round-1-4", (3 + 4, 3 + 2)),
        ("v", None, "round-1-4", (3 + 4, 3 + 2)),
    ],
)
def test_progressive_distillation_is_all_its_rounds(
    root: Path, tmp_path: Path, prediction: str, width: int | None, first: str, passes: tuple[int, int]
) -> None:
    for name in ("autoencoder", "towers", "data"):
        (tmp_path / name).symlink_to(root / name)
    miniature.teacher(tmp_path, prediction)
    tree = miniature.distill(tmp_path, {"kind": "progressive", "steps": 4, "until": 1}, guidance_embedding=width)
    job = job_of(load_run(miniature.write(tree, tmp_path / "rounds.yaml")), 1, gpu=True)
    cluster = Cluster(nodes=1, per_node=1, hardware=find("a100-80g"))
    found = rounds.plan(job, cluster)
    steps, count = miniature.train()["steps"], 4 if prediction == "epsilon" else 3
    assert found.steps == steps * count
    assert [(r.name, r.steps) for r in found.rounds] == [
        (first, steps),
        (f"round-{5 - count}-{4 if prediction == 'epsilon' else 2} to round-3-1", steps * (count - 1)),
    ]
    cond = {"text": torch.zeros(1, 12, 16)}
    forward = count_flops(UNet(decode(UNetConfig, miniature.UNET)), torch.zeros(1, 4, 8, 8), torch.zeros(1), cond)
    for each, wanted in zip((job, *job.then), passes, strict=True):
        alone = Planner(replace(each, then=()), cluster, recomputing=(False,))
        assert sum(o.flops for o in alone.activations[False].few.ops) / 2 == pytest.approx(wanted * forward, rel=0.1)


def test_class_pictures_are_counted_as_they_are_drawn(root: Path, tmp_path: Path) -> None:
    """Against the operations of really drawing one; those that are there already are not drawn again."""
    tree = subject(root, {"kind": "full"})
    tree["task"]["prior"]["folder"] = str(tmp_path)
    path = miniature.write(tree, tmp_path / "subject.yaml")
    run = load_run(path)
    drawn = job_of(run, 1, gpu=True).drawn
    assert isinstance(run.task, DreamboothTask)
    assert run.task.prior is not None
    model, settings = TextToImage.load(run.task.base), run.task.prior.settings

    def real(guidance: float) -> int:
        how = replace(settings, guidance=guidance, size=miniature.SIZE)
        return count_flops(lambda: model.sample(["a dot"], settings=how))

    assert drawn is not None
    assert drawn.count == 4
    assert drawn.flops == pytest.approx(real(2.0), rel=0.01)
    once = replace(run.task, prior=replace(run.task.prior, settings=replace(settings, guidance=1.0)))
    unguided = job_of(replace(run, task=once), 1, gpu=True).drawn
    assert unguided is not None
    assert unguided.flops == pytest.approx(real(1.0), rel=0.01)
    pictures_there = tmp_path / "there"
    pictures_there.mkdir()
    (pictures_there / "mine.png").write_bytes(large())
    there = replace(run.task, prior=replace(run.task.prior, folder=pictures_there))
    left = job_of(replace(run, task=there), 1, gpu=True).drawn
    assert left is not None
    assert left.count == 3


def large() -> bytes:
    """A picture that is large enough to be one of a class."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_fine_tuning_counts_the_pictures_of_its_folders(root: Path) -> None:
    """Where the shards are not written yet: three of the subject and four of the class."""
    tree = subject(root, {"kind": "full"})
    for source in tree["data"]["sources"]:
        source["data"]["path"] += "-later"
    run = load_run(miniature.write(tree, root / "later.yaml"))
    assert job_of(run, 1, gpu=True).samples == 3 + 4
    tree = words(root)
    tree["data"]["path"] += "-later"
    assert job_of(load_run(miniature.write(tree, root / "later.yaml")), 1, gpu=True).samples == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"kind": "progressive", "stage": "match"}, {"kind": "tcd"}, {"kind": "dmd"}])
def test_every_method_is_counted(root: Path, method: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"prediction": "v"} if method["kind"] == "progressive" else {}
    tree = miniature.distill(root, method, **changes)
    path = miniature.write(tree, root / "method.yaml")
    assert main(["plan", str(path), "--gpus-per-node", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    own = numbers(UNet(UNET)) + 32 * 64
    assert found["weights"] == (own + numbers(UNet(UNET)) if method["kind"] == "dmd" else own)  # with the critic
    assert found["point"]["images_per_second"] > 0


def test_sensitivity_is_two_more_forward_passes_each_time(root: Path) -> None:
    """Of the base and its ControlNet, counted by themselves."""
    path = config(root, "controlnet")

    def more(sensitivity: int) -> float:
        words = [f"task.sensitivity={sensitivity}"]
        cluster = Cluster(nodes=1, per_node=1, hardware=find("cpu"))
        return Planner(job_of(load_run(path, words), 1, gpu=False), cluster, recomputing=(False,)).frozen_flops

    base = TextToImage.load(root / "teacher")
    control = ControlNet.copy_of(base.network, base.codec.factor)
    t, cond = torch.zeros(1), told(base.network, tuple(e.config for e in base.text))
    cond = {k: torch.zeros(v.shape) for k, v in cond.items()}
    shown = cond | {"condition": torch.zeros(1, 3, miniature.SIZE, miniature.SIZE)}
    x = torch.zeros(1, base.codec.channels, *[miniature.SIZE // base.codec.factor] * 2)
    once = count_flops(control, x, t, shown) + count_flops(base.network, x, t, cond)
    assert more(4) - more(0) == pytest.approx(2 / 4 * once, rel=0.01)


@pytest.mark.parametrize(("made", "kept"), [("canny", "pixels"), ("blur", "pixels"), ("blur", "latents")])
def test_a_sample_of_a_cache_of_conditions_is_as_large_as_planned(root: Path, made: str, kept: str) -> None:
    path, cache = config(root, "controlnet"), root / f"cache-{made}-{kept}"
    run = load_run(path, [f"task.cache={cache}", f"data.pairs.condition={{kind: {made}, cache: {kept}}}"])
    planned = job_of(run, 1, gpu=False).sample_bytes
    assemble(run.task, run.data, run.train, 0, 0)
    with tarfile.open(next(cache.glob("*.tar"))) as tar:
        member = next(m for m in tar if m.name.endswith(".safetensors"))
        stored = load_tensors(tar.extractfile(member).read())  # type: ignore[union-attr]
    told = {key: v for key, v in stored.items() if key.partition(".")[0] in ("moments", "text", "pair")}
    # with the empty caption's states, which every sample has beside its own
    captions = told["text"][1:].numel() * 4
    assert planned == sum(v.numel() * v.element_size() for v in told.values()) - captions


@pytest.mark.parametrize(
    ("kind", "world"),
    [
        ("lora", 1),
        ("distill", 2),
        ("controlnet", 1),
        ("ip_adapter", 1),
        pytest.param("full", 2, marks=pytest.mark.slow),
        pytest.param("full with text", 1, marks=pytest.mark.slow),
        pytest.param("distill lora", 1, marks=pytest.mark.slow),
        pytest.param("clip", 1, marks=pytest.mark.slow),
        pytest.param("dreambooth", 1, marks=pytest.mark.slow),
        pytest.param("dreambooth", 2, marks=pytest.mark.slow),
        pytest.param("dreambooth lora", 1, marks=pytest.mark.slow),
        pytest.param("inversion", 1, marks=pytest.mark.slow),
    ],
)
def test_planned_memory_is_that_of_a_real_run(root: Path, kind: str, world: int) -> None:
    """The real objective under DeepSpeed, every allocation counted: model, optimizer, averages, frozen parts, step."""
    path = config(root, kind)
    job = job_of(load_run(path, [f"train.batch={MICRO * world}"]), world, gpu=False)
    planner = Planner(job, Cluster(nodes=1, per_node=world, hardware=find("cpu")), recomputing=(False,))
    expected = memory(planner.sizes, planner.activations[False], MICRO, job.layout, planner.frozen_bytes).total
    for _, highest in ranks.run(work.measured_task, world, str(path), MICRO, timeout=500):
        print(f"{kind} x {world}: {expected / highest - 1:+.1%}")
        assert expected == pytest.approx(highest, rel=0.1)
