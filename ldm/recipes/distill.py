"""Turn a text-conditional model into one of few steps: a frozen teacher, and a student that starts from it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import dist
from ldm.adapters.lora import LoraAdapter, LoraConfig, LoraNet, Low
from ldm.adapters.sites import network_sites
from ldm.checkpoint import files
from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.lora_files import NAME, read_lora, write_lora
from ldm.checkpoint.schedulers import scheduler_from_diffusers
from ldm.checkpoint.students import few_steps
from ldm.data.mixture import Data, with_caches
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.process import Process
from ldm.models import networks
from ldm.models.discriminator import MiddleHead, PatchHead
from ldm.models.families import family_of
from ldm.models.frozen import store
from ldm.models.network import Network, granularity
from ldm.models.shipped import SHIPPED, locate
from ldm.models.text import pad_with
from ldm.models.transformers.pixart import PixArtTransformer
from ldm.objectives import Objective
from ldm.objectives.consistency import ConsistencyObjective, ConsistencyOptions
from ldm.objectives.inputs import Feed, LatentFeed
from ldm.objectives.matching import Logits, MatchingObjective, MatchingOptions
from ldm.objectives.progressive import ProgressiveObjective, ProgressiveOptions
from ldm.objectives.teacher import Estimator, Target, Teacher
from ldm.objectives.trajectory import TrajectoryObjective, TrajectoryOptions
from ldm.pipeline import TextToImage
from ldm.plan.report import Frozen, Job
from ldm.plan.streaming import Streamed
from ldm.recipes import planned, planned_models
from ldm.recipes.base import Assembly
from ldm.recipes.distill_task import DistillTask
from ldm.recipes.frozen_parts import store_beside, store_network
from ldm.recipes.rounds import rounds
from ldm.recipes.sources import text_encoder, training_data
from ldm.recipes.student_schedulers import path_grid, spacing, student_scheduler
from ldm.recipes.text_to_image import SampleHook, cached, filled, hashes, sized
from ldm.rng import seed_torch
from ldm.sampling.run import whole
from ldm.train.trainer import TrainConfig
from ldm.types import Cond, Net


@dataclass(frozen=True)
class Student:
    """What trains, and how it, its target and the critic answer. `network` is what draws samples."""

    trained: nn.Module
    network: Network
    own: Estimator
    goal: Estimator
    target: Target | None
    critic: Estimator | None = None
    logits: Logits | None = None
    lora: LoraAdapter | None = None


def build(task: DistillTask, data: Data, train: TrainConfig, seed: int, workers: int) -> Assembly:
    """Teacher, student, data (encoded once, if so configured) and sample pictures."""
    seed_torch(seed)  # initial weights
    device = dist.device()
    source = TextToImage.load(task.teacher, device=device, text_precision=task.text_precision)
    pad_with(source.text, task.t5_padding, "task.t5_padding")
    if source.process.variance == "learned" and not isinstance(source.network, PixArtTransformer):
        raise ValueError(
            f"task.teacher: {task.teacher!r} learns its variance, which a student has no use for; give one without"
        )
    towers, codec, network = source.text, source.codec, source.network
    planned.check_patches(network, codec.factor, data)
    grid = family_of(network.config).grid
    student_scheduler(task.method, source.process, grid)  # refuses what cannot be drawn before anything is built
    schedule = source.process.schedule
    source.process = sized_process(source, data)
    student = make_student(task, network, source.process)
    storage, caches = train.engine.frozen, task.cache is not None or data.cached
    store_network(source, storage, trains=False)
    store_beside(storage, None, [] if caches else towers, task.text_precision)
    objective = make_objective(
        task, student, network, source.process, LatentFeed(codec, text_encoder(towers), task.drop)
    ).to(device)
    dist.say(f"weights in memory: {_told(memory(student, network))}")
    if task.cache is not None:
        data = with_caches(data, task.cache, lambda data, folder: cached(folder, data, codec, towers))
    expect = hashes(codec.autoencoder, towers) if data.cached else None
    store_beside(storage, codec.autoencoder, towers if caches else [], task.text_precision)
    loader = training_data(data, train, seed, workers, expect=expect)
    scheduler = student_scheduler(task.method, replace(student.own.process, schedule=schedule), grid)
    drawing = replace(student.own.process, variance=source.process.variance)
    pipeline = TextToImage(student.network, codec, towers, drawing, **spacing(task.method))
    pipeline.student = few_steps(scheduler, guided=not student.own.conditioned)
    if isinstance(task.method, ProgressiveOptions):
        pipeline.own = scheduler_from_diffusers(scheduler, grid=grid).own

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        own = _of_student(weights, student)
        if student.lora is not None:
            write_student_lora(folder, task.teacher, student.lora, own, network, scheduler)
        else:
            filled_in = filled(networks.build(student.network.config), own)
            as_loaded = task.text_precision == storage == "fp32"
            whole = source if as_loaded else TextToImage.load(task.teacher)
            save_diffusers(
                folder, network=filled_in, autoencoder=whole.codec.autoencoder, text=whole.text, scheduler=scheduler
            )
        facts = {"steps": train.steps, "batch": train.batch, "teacher": task.teacher, "method": task.method.kind}
        files.write_text(folder / "trained.json", json.dumps(facts))

    return Assembly(objective, loader, [SampleHook(sized(task.samples, network, data), pipeline)], export)


def sized_process(teacher: TextToImage, data: Data) -> Process:
    """The teacher's process on pictures of the data's size, on which a flow's dynamic shift depends."""
    side = planned.side(data) // teacher.codec.factor
    return teacher.at((side, side), 4).process


def make_student(task: DistillTask, teacher: Network, process: Process) -> Student:
    """A student that answers as the teacher without guidance does, and what it needs beside it.

    Raises ValueError for a prediction that the method cannot change.
    """
    wanted = process.prediction if task.prediction == "teacher" else PREDICTIONS[task.prediction]
    own_process = Process(schedule=process.schedule, prediction=wanted)
    method = task.method
    decay = method.decay if isinstance(method, (ConsistencyOptions, TrajectoryOptions)) else 0.0
    if task.lora is not None:
        teacher.enable_gradient_checkpointing(task.gradient_checkpointing)
        return _lora_student(task, task.lora, teacher, own_process, decay)
    if isinstance(method, ProgressiveOptions) and own_process.prediction.kind == "epsilon":
        raise ValueError(
            "prediction: progressive distillation needs v or sample; convert the teacher first: stage match"
        )
    width = task.guidance_embedding or teacher.guidance_width
    network = teacher.told_guidance(width).train()
    network.enable_gradient_checkpointing(task.gradient_checkpointing)
    own = _estimator(network, network, own_process)
    if isinstance(method, MatchingOptions):
        return _beside_critic(method, network, teacher, own)
    if decay == 0:
        return Student(network, network, own, own, None)
    twin = copy.deepcopy(network).requires_grad_(False).eval()
    target = Target(dict(twin.named_parameters()), decay)
    return Student(network, network, own, _estimator(twin, network, own_process), target)


def _beside_critic(
    options: MatchingOptions, trained: nn.Module, teacher: Network, own: Estimator, lora: LoraAdapter | None = None
) -> Student:
    """The student with a critic, a whole copy of the teacher, and the head of the adversarial term if there is one."""
    critic = teacher.told_guidance(teacher.guidance_width).train()
    both = nn.ModuleDict({"student": trained, "critic": critic})
    logits: Logits | None = None
    if options.adversarial:
        middle, schedule = critic.middle, own.process.schedule
        if options.judge == "middle":
            _check_middle(critic)
        like = next(critic.parameters())
        if options.judge == "patches":
            patches = both["head"] = PatchHead(min(critic.in_channels, critic.out_channels)).to(like)
            logits = lambda x, t, cond: patches(x, schedule.alpha_sigma(t, x.dtype)[1])  # noqa: E731
        else:
            head = both["head"] = MiddleHead(critic.middle_channels, critic.middle_groups).to(like)
            logits = lambda x, t, cond: head(middle(x, t, cond))  # noqa: E731
    network = trained if isinstance(trained, Network) else teacher
    return Student(both, network, own, own, None, _estimator(critic, critic, own.process), logits, lora)


def _check_middle(critic: Network) -> None:
    """Raise ValueError, naming the key, for a network without features half way."""
    try:
        _ = critic.middle_channels
    except ValueError as error:
        raise ValueError(f"method.judge: 'middle', but {error}; take 'patches'") from None


def _lora_student(task: DistillTask, config: LoraConfig, teacher: Network, process: Process, decay: float) -> Student:
    adapter = LoraAdapter(config)
    net = adapter.attach(teacher, [])
    if task.start is not None:
        _start_from(task.start, task.teacher, adapter, net, teacher)
    own = _estimator(net, teacher, process)
    if isinstance(task.method, MatchingOptions):
        return _beside_critic(task.method, net, teacher, own, adapter)
    if decay == 0:
        return Student(net, teacher, own, own, None, lora=adapter)
    twin = twin_of(net, teacher, config)

    def goal(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with net.using(twin):
            return net(x, t, cond)

    weights = {f"layers.{name}": p for name, p in twin.named_parameters()}
    return Student(net, teacher, own, _estimator(goal, teacher, process), Target(weights, decay), lora=adapter)


def _estimator(net: Net, network: Network, process: Process) -> Estimator:
    """A network, or what stands around it, as estimates; told the guidance where the network is."""
    return Estimator(net, process, network.guidance_width is not None, network.guidance_is_scale)


def _start_from(start: str, base: str, adapter: LoraAdapter, net: LoraNet, teacher: Network) -> None:
    """Begin with the corrections of a shipped student's, run's or folder's LoRA. Raises ValueError naming `start`."""
    try:
        folder = locate(start)
        folder = folder if (folder / NAME).is_file() else folder / "export"
        told = folder / "adapter.json"
        of = json.loads(told.read_text(encoding="utf-8"))["base"] if told.is_file() else base
        if SHIPPED.get(of, Path(of)).resolve() != SHIPPED.get(base, Path(base)).resolve():
            raise ValueError(f"a LoRA of {of!r}, while the teacher is {base!r}")
        adapter.load(net, read_lora(folder, teacher, []))
    except ValueError as error:
        raise ValueError(f"start {start!r}: {error}") from None


def twin_of(net: LoraNet, network: Network, config: LoraConfig) -> nn.ModuleDict:
    """Equal corrections of the same layers, with weights of their own and not in the engine."""
    sites = {site.name.replace(".", "/"): site for site in network_sites(network)}
    twin = nn.ModuleDict({key: Low(sites[key], config, net.network) for key in net.layers})
    twin.load_state_dict(net.layers.state_dict(), strict=True)
    return twin.requires_grad_(False).eval()


def make_objective(task: DistillTask, student: Student, network: Network, process: Process, feed: Feed) -> Objective:
    """The distillation's loss. `network` is the teacher's."""
    corrected = student.own.net
    net = frozen(corrected) if isinstance(corrected, LoraNet) else network
    guided = task.method.w != (0.0, 0.0)
    teacher = Teacher(_estimator(net, network, process), feed.empty if guided else None)
    method, trained = task.method, student.trained
    if isinstance(method, ConsistencyOptions):
        return ConsistencyObjective(trained, student.own, student.goal, teacher, feed, method, student.target)
    if isinstance(method, TrajectoryOptions):
        return TrajectoryObjective(trained, student.own, student.goal, teacher, feed, method, student.target)
    if isinstance(method, MatchingOptions):
        assert student.critic is not None
        return MatchingObjective(trained, student.own, student.critic, teacher, feed, method, student.logits)
    grid = path_grid(method, process, family_of(network.config).grid)
    if grid is None:
        return ProgressiveObjective(trained, student.own, teacher, feed, method)
    told = replace(student.own, net=whole(student.own.net))  # as its sampler tells it
    guide = Teacher(_estimator(whole(net), network, process), feed.empty if guided else None)
    return ProgressiveObjective(trained, told, guide, feed, method, grid)


def frozen(net: LoraNet) -> Any:
    """The model below the corrections."""

    def call(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with net.disabled():
            return net(x, t, cond)

    return call


def _of_student(weights: Mapping[str, Tensor], student: Student) -> dict[str, Tensor]:
    if student.critic is None:
        return dict(weights)
    return {k.removeprefix("student."): v for k, v in weights.items() if k.startswith("student.")}


def write_student_lora(
    folder: Path,
    base: str,
    adapter: LoraAdapter,
    weights: Mapping[str, Tensor],
    network: Network,
    scheduler: Mapping[str, Any],
) -> None:
    """The corrections in float16, the base's name (so that the folder is a model by itself), the sampler's config."""
    write_lora(folder / NAME, adapter.lora(weights), network.config, dtype=torch.float16)
    files.write_text(folder / "scheduler_config.json", json.dumps(dict(scheduler), indent=2) + "\n")
    files.write_text(folder / "adapter.json", json.dumps({"base": base, "loras": [NAME], "embeddings": []}, indent=1))


def memory(student: Student, teacher: Network) -> dict[str, int]:
    """Bytes of the weights that training holds, each storage once, beside gradients and optimizer state.

    "shared" is what teacher and student have in common.
    """
    trained = _storages(student.trained.parameters())
    base = _storages([*teacher.parameters(), *teacher.buffers()])
    target = _storages(student.target.tensors().values() if student.target else [])
    below = _storages([*student.network.parameters(), *student.network.buffers()])
    return {
        "trained": sum(trained.values()),
        "teacher": sum(v for k, v in base.items() if k not in below),
        "shared": sum(v for k, v in base.items() if k in below),
        "target": sum(v for k, v in target.items() if k not in trained),
    }


def _storages(tensors: Any) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _told(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / 2**20:.1f} MB" for name, size in sizes.items())


__all__: Sequence[str] = ("DistillTask", "Student", "build", "make_objective", "make_student")


def job(task: DistillTask, data: Data, train: TrainConfig, asked: planned.Asked) -> Job:
    """A student, its frozen teacher and its target; a LoRA shares the teacher's weights. Progressive: all rounds."""
    said: list[str] = []
    base = planned_models.whole(task.teacher, "task.teacher", said)
    planned.fits(base, data, "task.teacher", task.teacher)
    student_scheduler(task.method, base.process)
    base.process = sized_process(base, data)
    cached = task.cache is not None or data.cached
    planned.check_cache(task.cache, cached, said, base.text)
    task = replace(task, start=None)  # what the weights are does not change what they take
    if not isinstance(task.method, ProgressiveOptions):
        return _round_job(task, base, data, train, asked, said, cached)
    return _rounds_job(task, base, data, train, asked, said, cached)


def _round_job(
    task: DistillTask, base: TextToImage, data: Data, train: TrainConfig, asked: planned.Asked, said: list[str],
    cached: bool,
) -> Job:  # fmt: skip
    how = granularity(task.gradient_checkpointing)

    def made(recompute: bool) -> tuple[Student, Network]:
        teacher = copy.deepcopy(base.network)
        chosen = replace(task, gradient_checkpointing=planned.again(how, recompute))
        student = make_student(chosen, teacher, base.process)
        store(teacher, train.engine.frozen)
        return student, teacher

    def build(recompute: bool) -> nn.Module:
        student, teacher = made(recompute)
        feed = LatentFeed(base.codec, planned.states(base), task.drop)
        return planned.Loss(make_objective(task, student, teacher, base.process, feed))

    student, teacher = made(False)
    streamed, kept = Streamed.of(teacher, train.engine.blocks_on_device, "teacher"), list[Frozen]()
    if student.target is not None:
        kept.append(Frozen(name="target", bytes=4.0 * sum(t.numel() for t in student.target.tensors().values())))
    return planned.loss_job(
        asked, data, train, build, lambda batch: (planned.latents(base, data, batch),),
        frozen=[*kept, *planned.beside(base, data, cached, False, task.text_precision, train.engine.frozen)],
        recompute=how != "none", said=said, cached=cached, streamed=streamed,
    )  # fmt: skip


def _rounds_job(
    task: DistillTask, base: TextToImage, data: Data, train: TrainConfig, asked: planned.Asked, said: list[str],
    cached: bool,
) -> Job:  # fmt: skip
    """The first round, and once for all the later ones, which are alike: their teacher is a student."""
    first, *later = rounds(task, Path(), base.process.prediction.kind)
    found = _round_job(first.task, base, data, train, asked, said, cached)
    if not later:
        return found
    student = make_student(first.task, copy.deepcopy(base.network), base.process)
    model = copy.copy(base)
    model.network, model.process = student.network.requires_grad_(False).eval(), student.own.process
    every = replace(train, steps=len(later) * train.steps)
    rest = _round_job(later[0].task, model, data, every, asked, [], cached)
    name = later[0].name if len(later) == 1 else f"{later[0].name} to {later[-1].name}"
    return replace(found, round=first.name, then=(replace(rest, round=name),))
