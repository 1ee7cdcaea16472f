"""Jobs whose training step is counted from the loss itself: CLIP, fine-tuning and distillation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.cli import plan_models as models
from ldm.cli import plan_parts as parts
from ldm.models.fit import check_fit
from ldm.plan.report import Frozen, Job
from ldm.rng import Rng

if TYPE_CHECKING:
    from ldm.adapters.full import FullConfig
    from ldm.adapters.lora import LoraConfig
    from ldm.adapters.tokens import TokensConfig
    from ldm.config.schema import RunConfig
    from ldm.models.network import Granularity
    from ldm.objectives import Objective
    from ldm.pipeline import TextToImage
    from ldm.recipes.clip import ClipTask
    from ldm.recipes.distill import DistillTask
    from ldm.recipes.dreambooth import DreamboothTask
    from ldm.recipes.finetune import FinetuneTask
    from ldm.recipes.inversion import InversionTask


class Loss(nn.Module):
    """An objective as a network from a batch to its loss; only what trains is registered."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.objective(batch, Rng.of(0, batch["position"]))[0]


def clip(config: RunConfig, task: ClipTask, world: int, gpu: bool) -> Job:
    """Both towers on pictures and tokens."""
    from ldm.models.text import build_clip
    from ldm.objectives.contrastive import ContrastiveObjective

    def build(recompute: bool) -> nn.Module:
        with torch.device("meta"):
            model = build_clip(task.model).train()
        return Loss(ContrastiveObjective(model, task.augment))

    def inputs(batch: int) -> tuple[Any, ...]:
        size = task.model.image_size
        tokens = torch.zeros(batch, task.model.context_length, dtype=torch.int64)
        return (_positions(batch) | {"image": torch.zeros(batch, 3, size, size), "tokens": tokens},)

    said = ["checkpointing is not counted: the towers have none", *_attention(gpu)]
    return _job(config, world, gpu, build, inputs, said=said)


def finetune(config: RunConfig, task: FinetuneTask | DreamboothTask | InversionTask, world: int, gpu: bool) -> Job:
    """A base model with its adapter: `unet` is frozen beside a LoRA or new tokens."""
    from ldm.adapters.full import FullConfig
    from ldm.models.network import granularity
    from ldm.objectives.denoise import DenoiseObjective
    from ldm.recipes.finetune import make_adapter

    how = granularity(task.gradient_checkpointing)
    said: list[str] = []
    base = models.whole(task.base, "task.base", said)
    base.process = replace(base.process, weighting=task.weighting)
    _fits(base, config, "task.base", task.base)
    kind = _adapter(task)
    live = make_adapter(kind).trains_text

    def build(recompute: bool) -> nn.Module:
        model, adapter = _copied(base), make_adapter(kind)
        trained = adapter.attach(model.network, model.text)
        model.network.enable_gradient_checkpointing(_again(how, recompute))
        encode = _live(model) if live else _states(base)
        return Loss(DenoiseObjective(trained, model.process, model.codec, encode, task.options, live=live))

    cached = task.cache is not None or parts.cached(config)
    said += _attention(gpu) if live else []
    if not cached:
        said.append("no cache: VAE and text tower run for every image of every step; set task.cache to encode once")
    full = isinstance(kind, FullConfig)
    kept = [] if full else [Frozen(name="unet", bytes=_weight(base.network))]
    kept += _beside(base, config, cached, live)
    pooled = base.network.config.addition_embed_type is not None
    return _job(
        config, world, gpu, build, lambda b: (_latents(base, config, b, pooled=pooled),), frozen=kept,
        recompute=how != "none", said=said, cached=cached,
    )  # fmt: skip


def distill(config: RunConfig, task: DistillTask, world: int, gpu: bool) -> Job:
    """A student, its frozen teacher and its target; a LoRA shares the teacher's weights."""
    from ldm.models.network import granularity
    from ldm.objectives.inputs import LatentFeed
    from ldm.recipes.distill import Student, make_objective, make_student

    how = granularity(task.gradient_checkpointing)
    said: list[str] = []
    base = models.whole(task.teacher, "task.teacher", said)
    task = replace(task, start=None)  # what the weights are does not change what they take
    _fits(base, config, "task.teacher", task.teacher)

    def made(recompute: bool) -> tuple[Student, Any]:
        teacher = copy.deepcopy(base.network)
        chosen = replace(task, gradient_checkpointing=_again(how, recompute))
        return make_student(chosen, teacher, base.process), teacher

    def build(recompute: bool) -> nn.Module:
        student, teacher = made(recompute)
        feed = LatentFeed(base.codec, _states(base), task.drop)
        return Loss(make_objective(task, student, teacher, base.process, feed))

    student, _ = made(False)
    kept = [Frozen(name="teacher", bytes=_weight(base.network))]
    if student.target is not None:
        kept.append(Frozen(name="target", bytes=4.0 * sum(t.numel() for t in student.target.tensors().values())))
    cached = task.cache is not None or parts.cached(config)
    said += [] if cached else ["no cache: VAE and text tower run for every image of every step; set task.cache"]
    pooled = base.network.config.addition_embed_type is not None
    return _job(
        config, world, gpu, build, lambda b: (_latents(base, config, b, pooled=pooled),),
        frozen=[*kept, *_beside(base, config, cached, live=False)], recompute=how != "none", said=said,
        cached=cached,
    )  # fmt: skip


def _again(how: Granularity, recompute: bool) -> Granularity:
    """What is computed twice in the plan's rows with recomputation: what is configured, or whole blocks."""
    return "none" if not recompute else "block" if how == "none" else how


def _job(
    config: RunConfig,
    world: int,
    gpu: bool,
    build: Callable[[bool], nn.Module],
    inputs: Callable[[int], tuple[Any, ...]],
    *,
    frozen: Sequence[Frozen] = (),
    recompute: bool = False,
    said: list[str],
    cached: bool = False,
) -> Job:
    batch = inputs(1)[0]
    encoded = 2.0 * sum(batch[k].numel() for k in ("moments", "text", "pooled") if k in batch)
    samples, size = parts.data(config, encoded, cached, said)
    return Job(
        name=config.name, build=build, inputs=inputs, flops=None, batch=config.train.batch, steps=config.train.steps,
        layout=parts.layout(config, world, gpu), recompute=recompute, precision=parts.precision(config, gpu),
        frozen=tuple(frozen), samples=samples, sample_bytes=size, warnings=tuple(said),
    )  # fmt: skip


def _adapter(task: FinetuneTask | DreamboothTask | InversionTask) -> FullConfig | LoraConfig | TokensConfig:
    """What trains. New tokens have no bound here: there are no weights to take the norms of."""
    from ldm.adapters.tokens import NewToken, TokensConfig
    from ldm.recipes.inversion import InversionTask

    if not isinstance(task, InversionTask):
        return task.adapter
    tokens = tuple(NewToken(token=c.token, vectors=c.vectors) for c in task.concepts)
    return TokensConfig(tokens=tokens, max_norm=0.0)


def _fits(model: TextToImage, config: RunConfig, key: str, source: str) -> None:
    """Raise ValueError where the model's parts do not fit each other, or the data's size does not fit it."""
    told = f"{key} {source!r}"
    check_fit(
        model.network.config, tuple(t.config for t in model.text), model.codec.channels,
        network_key=f"{told}: U-Net", text_key="its text tower", vae_key="its autoencoder",
    )  # fmt: skip
    pixels = parts.pixels(config, (model.network.config.sample_size or 64) * model.codec.factor)
    models.check_size(pixels, model.codec.factor, "data.size")


def _copied(model: TextToImage) -> TextToImage:
    """A copy that an adapter may change."""
    other = copy.copy(model)
    other.network, other.text = copy.deepcopy(model.network), copy.deepcopy(model.text)
    return other


def _states(model: TextToImage) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    """Prompts -> conditioning of the right shape, computed by nobody: a cache's, or of frozen towers."""
    tokens, width, pooled = _shape(model)

    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"text": torch.zeros(len(prompts), tokens, width), "pooled": torch.zeros(len(prompts), pooled)}

    return encode


def _live(model: TextToImage) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    from ldm.models.text import encode_texts

    return lambda prompts: encode_texts(model.text, prompts)


def _shape(model: TextToImage) -> tuple[int, int, int]:
    """Tokens, width of their states together, width of the pooled vector."""
    configs = [tower.config for tower in model.text]
    return configs[0].context_length, sum(c.width for c in configs), configs[-1].projection or configs[-1].width


def _positions(batch: int) -> dict[str, Any]:
    """One sample many times, so that counts are linear in the batch; one whose time is late, as those work most."""
    late = max(range(100), key=lambda p: float(Rng.of(0, [p]).uniform("time")))
    return {"position": torch.full((batch,), late), "weight": torch.ones(batch), "key": ["a"] * batch}


def _latents(model: TextToImage, config: RunConfig, batch: int, *, pooled: bool) -> dict[str, Any]:
    """A batch as a cache gives it; its captions are read where the towers train."""
    tokens, width, vector = _shape(model)
    side = parts.pixels(config, (model.network.config.sample_size or 64) * model.codec.factor) // model.codec.factor
    found = _positions(batch) | {
        "moments": torch.empty(batch, 2 * model.codec.channels, side, side, device="meta"),
        "text": torch.empty(batch, tokens, width, device="meta"),
        "caption": ["a"] * batch,
    }
    if pooled:
        found |= {"pooled": torch.empty(batch, vector, device="meta")}
        found |= {k: torch.zeros(batch, 2) for k in ("original_size", "crop_top_left", "target_size")}
    return found


def _beside(model: TextToImage, config: RunConfig, cached: bool, live: bool) -> list[Frozen]:
    """VAE and text towers. Towers that train have copies for the sample pictures, or are frozen below corrections."""
    pixels = parts.pixels(config, (model.network.config.sample_size or 64) * model.codec.factor)
    found = parts.frozen(model.codec.autoencoder, model.text, pixels, model.text[0].config.context_length, cached)
    return [replace(f, flops=0.0) if live and f.name != "vae" else f for f in found]


def _weight(module: nn.Module) -> float:
    return 4.0 * sum(p.numel() for p in module.parameters())


def _attention(gpu: bool) -> list[str]:
    return ["attention of text and picture towers that train is counted in float32"] if gpu else []
