"""The common recipe as others write it: diffusers' network, scheduler and EMA around torch's AdamW in a plain loop.

The data path, the latents and the text states are ours, and so is the drawing, through our network with their weights:
only training is theirs. Captions are dropped as ours are, without which nobody could draw with guidance.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.quality import cache
from bench.quality.course import Clock, Course, Watch, planned, seconds_a_step
from bench.quality.judge import Quality
from bench.quality.ours import COUNT, WARM
from bench.quality.rows import Recipe, placed
from bench.quality.runs import Spec
from ldm import allocator
from ldm.config.load import encode
from ldm.diffusion.prediction import Epsilon
from ldm.diffusion.schedule import Discrete
from ldm.diffusion.weighting import Uniform
from ldm.models import networks
from ldm.models.unet import UNetConfig
from ldm.pipeline import TextToImage
from ldm.recipes import assemble
from ldm.recipes.text_to_image import SampleHook
from ldm.rng import key
from ldm.sampling.texts import lengthened
from ldm.train.stop import AGAIN, Stop

STATE = "peer.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def check(recipe: Recipe) -> None:
    """Raise ValueError for what this loop does not do."""
    process, train = recipe.task.process, recipe.run.train
    refused = {
        "task.network.kind": isinstance(recipe.task.network, UNetConfig),
        "task.process.schedule": isinstance(process.schedule, Discrete) and not process.schedule.zero_terminal_snr,
        "task.process.prediction": isinstance(process.prediction, Epsilon),
        "task.process.weighting": isinstance(process.weighting, Uniform),
        "train.optim": train.optim.algorithm == "adamw" and train.optim.decay == "constant" and not train.optim.warmup,
        "train.accumulate": train.accumulate == 1,
        "train.ema": train.ema is not None,
        "train.engine.precision": train.engine.precision in ("fp32", "bf16"),
    }
    for name, fits in refused.items():
        if not fits:
            raise ValueError(f"{recipe.name}: {name}: the loop by diffusers trains the common recipe alone")


class Peer:
    """Network, optimizer, average and noise of one run."""

    def __init__(self, recipe: Recipe, seed: int, pipeline: TextToImage) -> None:
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from diffusers.training_utils import EMAModel

        train, schedule = recipe.run.train, recipe.task.process.schedule
        assert isinstance(schedule, Discrete)
        assert train.ema is not None
        torch.manual_seed(seed)
        told = {k: v for k, v in encode(recipe.task.network).items() if v is not None and k != "kind"}
        unet: Any = UNet2DConditionModel
        self.unet = unet.from_config(told).train()
        scheduler: Any = DDPMScheduler
        self.scheduler = scheduler(
            num_train_timesteps=schedule.steps, beta_schedule=schedule.betas, beta_start=schedule.beta_start,
            beta_end=schedule.beta_end, prediction_type="epsilon",
        )  # fmt: skip
        optim = train.optim
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        self.ema: Any = EMAModel(self.unet.parameters(), decay=train.ema.decay)
        self.clip, self.half = train.engine.clip, train.engine.precision == "bf16"
        self.drop, self.seed, self.codec = recipe.task.options.drop, seed, pipeline.codec
        with torch.no_grad():
            self.empty = pipeline.encode_text([""])["text"].float()
        self.step = 0

    def train(self, batch: dict[str, Any]) -> float:
        """One step on cached moments and text."""
        draws = torch.Generator().manual_seed(key(self.seed, self.step, "peer"))
        moments, text = batch["moments"].float(), lengthened(batch["text"].float(), self.empty.shape[1])
        count = len(moments)
        latents = self.codec.sample(moments, torch.randn(moments.chunk(2, dim=1)[0].shape, generator=draws))
        text = torch.where(torch.rand(count, 1, 1, generator=draws) < self.drop, self.empty, text)
        noise = torch.randn(latents.shape, generator=draws)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (count,), generator=draws)
        noisy = self.scheduler.add_noise(latents, noise, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            answer = self.unet(noisy, t, encoder_hidden_states=text, return_dict=False)[0]
        loss = functional.mse_loss(answer.float(), noise)
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.unet.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        self.step += 1
        return loss.item()

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights by name."""
        named = [name for name, _ in self.unet.named_parameters()]
        return {n: p.detach().clone() for n, p in zip(named, self.ema.shadow_params, strict=True)}

    def save(self, path: Path) -> None:
        """Everything that the next step depends on, in one file that is whole or absent."""
        tensors = {f"average.{n}": p for n, p in self.averaged().items()}
        for name, p in self.unet.named_parameters():
            tensors[f"weight.{name}"] = p.detach()
            tensors |= {f"{kind}.{name}": self.optimizer.state[p][kind] for kind in MOMENTS}
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        told = {"step": str(self.step), "updates": str(self.ema.optimization_step)}
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, beside, metadata=told)
        os.replace(beside, path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Undo `save`."""
        with safetensors.safe_open(path, "pt") as file:
            told = file.metadata()
            for (name, p), average in zip(self.unet.named_parameters(), self.ema.shadow_params, strict=True):
                p.copy_(file.get_tensor(f"weight.{name}"))
                average.copy_(file.get_tensor(f"average.{name}"))
                self.optimizer.state[p] = {kind: file.get_tensor(f"{kind}.{name}") for kind in MOMENTS}
        self.step, self.ema.optimization_step = int(told["step"]), int(told["updates"])


def run(spec: Spec, recipe: Recipe, quality: Callable[[], Quality]) -> int:
    """Train to the budget from wherever the run folder is; 0 at the end, `AGAIN` when told to stop."""
    check(recipe)
    allocator.keep_freed_memory("cpu")  # which drawing would do to it at the first mark
    folder = cache.folder_of(Path(spec.out), recipe)
    told = placed(recipe, spec.work, folder, spec.seed, 1)
    with cache.alone(folder):
        assembly = assemble(told.task, told.data, told.train, told.seed, told.workers)
    pipeline = next(h.pipeline for h in assembly.hooks if isinstance(h, SampleHook))
    state = spec.work / STATE
    course = Course.read(spec.work / "course.json")
    if course is None:
        thrown, batches = Peer(recipe, spec.seed, pipeline), assembly.loader.batches(0)
        warm, count = (1, 3) if spec.quick else (WARM, COUNT)
        rate = seconds_a_step(lambda: thrown.train(next(batches)), warm, count)
        course = Course(spec.work / "course.json", planned(spec.budget, rate), rate)
    peer = Peer(recipe, spec.seed, pipeline)
    if state.is_file():
        peer.load(state)
    clock = Clock(course.begin(peer.step))
    course.write()
    watch = Watch(
        course, clock, spec.budget, spec.marks, batch=told.train.batch, save=lambda: peer.save(state),
        measure=lambda: quality().of(judged(peer, recipe, pipeline), recipe.task.samples.settings),
    )  # fmt: skip
    stop = Stop()
    restore = stop.listen()
    try:
        batches = assembly.loader.batches(peer.step)
        clock.start()
        while peer.step < course.steps:
            peer.train(next(batches))
            watch.after(peer.step)
            if stop.asked and peer.step < course.steps:
                watch.keep(peer.step)
                peer.save(state)
                return AGAIN
    finally:
        restore()
    return 0


def judged(peer: Peer, recipe: Recipe, pipeline: TextToImage) -> TextToImage:
    """Our pipeline around our network of the same names with the averaged weights."""
    assert recipe.task.network is not None
    network = networks.build(recipe.task.network)
    network.load_state_dict({**dict(network.named_buffers()), **peer.averaged()}, strict=True)
    return pipeline.with_network(network.eval().requires_grad_(False))
