"""What DreamBooth, textual inversion and LoRA share: a base model, an adapter, the denoising loss, an export."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from ldm import dist
from ldm.adapters.full import FullAdapter, FullConfig
from ldm.adapters.lora import LoraAdapter, LoraConfig, LoraNet
from ldm.adapters.pivotal import Pivotal, PivotalAdapter, PivotalConfig
from ldm.adapters.tokens import TokensAdapter, TokensConfig
from ldm.checkpoint.lora_files import read_lora
from ldm.config.load import decode
from ldm.data.encode import EncodeConfig, encode, finish
from ldm.data.loader import DataConfig
from ldm.data.mixture import Data, main_source, with_caches
from ldm.data.pairs import enough
from ldm.diffusion.density import (
    CosMap,
    FluxShift,
    Importance,
    LogitNormal,
    Mode,
    ShiftedUniform,
    UniformTimes,
)
from ldm.diffusion.process import Process
from ldm.diffusion.weighting import P2, SNR, VLB, X0, CosMapWeight, Debiased, MinSNR, SigmaSqrt, SoftMinSNR, Uniform
from ldm.models.network import Granularity, granularity
from ldm.models.text import (
    T5Padding,
    TextEncoder,
    TextPrecision,
    check_text_precision,
    encode_texts,
    pad_with,
)
from ldm.models.vae.latents import LatentCodec
from ldm.objectives import Objective
from ldm.objectives.align import FEATURES
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.objectives.inputs import EncodeText
from ldm.objectives.preserve import Preserve, PreservingObjective
from ldm.pipeline import TextToImage
from ldm.plan.report import Job
from ldm.recipes import concat, planned, planned_frozen, planned_models
from ldm.recipes.base import Assembly
from ldm.recipes.finetune_export import AnyAdapter, load_tower, write_export
from ldm.recipes.frozen_parts import open_on, store_beside, store_network
from ldm.recipes.page import write_page
from ldm.recipes.picture_masks import check_masks
from ldm.recipes.pictures import prepare
from ldm.recipes.smaller import check_pictures
from ldm.recipes.sources import cache_hashes, text_encoder, training_data
from ldm.recipes.text_to_image import SampleHook, Samples, sample_hook, sized, told_options
from ldm.recipes.validation import share_of
from ldm.rng import seed_torch
from ldm.train.packages import check_divided
from ldm.train.trainer import TrainConfig, Trainer
from ldm.types import Cond

Density = UniformTimes | LogitNormal | Mode | CosMap | ShiftedUniform | FluxShift | Importance
FLOAT32 = 4
"""Bytes of an element of latents and text in a cache of fine-tuning."""
AnyConfig = FullConfig | LoraConfig | TokensConfig | PivotalConfig


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """What every fine-tuning has; abstract.

    `base`: the model to start from, as `ldm.load` takes it. `weighting` is of the loss; schedule and prediction are the
    base's. `density` is of training times, None: the family's usual one; so is what a network is told of the guidance
    where `options.guidance` is null. `text_precision`: what text encoders that do not train are kept and computed in;
    `t5_padding` as in text_to_image. With `cache`, a folder, pictures are encoded once, and captions too unless the
    text encoders train. `masks`: where the masks of the pictures in `images` are, for `options.mask`
    (`ldm.recipes.picture_masks`: alpha, a suffix, a folder). `preserve`: of a LoRA, a second term that keeps the
    model's own answers.
    """

    base: str = "emoji"
    text_precision: TextPrecision = "fp32"
    t5_padding: T5Padding = "unmodified"
    weighting: Uniform | MinSNR | SoftMinSNR | SNR | Debiased | P2 | VLB | X0 | SigmaSqrt | CosMapWeight = field(
        default_factory=Uniform
    )
    density: Density | None = None
    options: DenoiseOptions = field(default_factory=lambda: DenoiseOptions(drop=0.0))
    cache: Path | None = None
    masks: str | None = None
    gradient_checkpointing: bool | Granularity = False
    """Whether activations are computed again in the backward pass, for less memory."""
    samples: Samples = field(default_factory=Samples)
    preserve: Preserve | None = None

    def words(self, data: Data) -> tuple[str, str]:
        """The word that captions say of what is taught, and that of its class; empty where there is none."""
        return main_source(data).trigger, ""


@dataclass(frozen=True, kw_only=True)
class FinetuneTask(Finetuning):
    """Train on captioned pictures. With `images`, a folder, they are written as the shards of `data.path` first.

    With the adapter `full` and `options.concat` a base that is told no picture is widened, and answers as before at
    first.
    """

    kind: Literal["finetune"] = "finetune"
    images: Path | None = None
    adapter: FullConfig | LoraConfig = field(default_factory=LoraConfig)
    """What trains: a LoRA, or all weights."""


@dataclass(frozen=True)
class CachedFeatures:
    """What a frozen network has of pictures (B, 3, H, W) in [-1, 1]; `told` names it with its weights."""

    encode: Callable[[Tensor], Tensor]
    told: str


def build(task: FinetuneTask, data: Data, train: TrainConfig, seed: int, workers: int) -> Assembly:
    """The base model with its adapter on captioned pictures."""
    pipeline = open_base(task, task.adapter, train)
    if isinstance(task.adapter, FullConfig):
        pipeline = concat.widened(task.options.concat, pipeline)
    if task.images is not None:
        source = only_source(data)
        prepare(task.images, Path(source.path), None, source.size, share_of(train, data), task.masks)
    return assembled(task, make_adapter(task.adapter), pipeline, data, train, seed, workers, task.images)


def open_base(task: Finetuning, adapter: AnyConfig | None, train: TrainConfig) -> TextToImage:
    """The base model with the loss's weighting and density; `assembled` stores what does not train as configured."""
    task.options.check(train.micro_batch(dist.world_size()))
    check_divided(train.optim.algorithm, train.engine, dist.world_size())
    blocks = train.engine.blocks_on_device
    if blocks is not None and isinstance(adapter, FullConfig):
        raise ValueError(
            f"train.engine.blocks_on_device: {blocks} needs a network that stays frozen (task.adapter lora); with "
            "adapter full its blocks train; write null"
        )
    pipeline = open_on(task.base, train.engine.frozen, task.text_precision, blocks)
    pad_with(pipeline.text, task.t5_padding, "task.t5_padding")
    pipeline.process = trained_process(task, pipeline)
    return pipeline


def trained_process(task: Finetuning, base: TextToImage) -> Process:
    """The base's process with the loss's weighting, and the density that is asked for or usual in its family."""
    density, usual = task.density, base.family.density
    if density is None and usual is not None and not base.process.schedule.discrete:
        density = decode(cast("Any", Density), dict(usual), "density")
    return replace(base.process, weighting=task.weighting, density=density or base.process.density)


def make_adapter(config: AnyConfig) -> AnyAdapter:
    """The adapter of a config."""
    if isinstance(config, FullConfig):
        return FullAdapter(config)
    if isinstance(config, PivotalConfig):
        return PivotalAdapter(config)
    return LoraAdapter(config) if isinstance(config, LoraConfig) else TokensAdapter(config)


def only_source(data: Data) -> DataConfig:
    """The data set of a config without a mixture."""
    if not isinstance(data, DataConfig):
        raise ValueError("data: expected one data set, got a mixture")
    return data


def assembled(
    task: Finetuning,
    adapter: AnyAdapter,
    pipeline: TextToImage,
    data: Data,
    train: TrainConfig,
    seed: int,
    workers: int,
    images: Path | None,
    drawn: Callable[[Samples, TextToImage], SampleHook] | None = None,
    features: CachedFeatures | None = None,
) -> Assembly:
    """Caches, adapter, objective, loader, sample pictures and export of a prepared data set.

    `drawn` makes what draws the samples, where it is not `sample_hook`; `features` are cached beside the latents.
    """
    seed_torch(seed)  # initial weights of the adapter
    concat.check_noise(task.options.concat, pipeline.augmentation, f"task.base {task.base!r}")
    pipeline.augmentation = concat.augmentation(task.options.concat)
    drawn = drawn or partial(sample_hook, options=task.options)
    network, title = pipeline.network, f"task.base {task.base!r}: its {pipeline.network.title}"
    concat.check(task.options.concat, network.config, network.in_channels, pipeline.codec, data, title)
    planned.check_patches(pipeline.network, pipeline.codec.factor, data)
    check_masks(task.options.mask, task.masks, data)
    check_pictures(task.options.small, pipeline.network, pipeline.codec.factor, data)
    codec, towers, live = pipeline.codec, pipeline.text, adapter.trains_text
    check_text_precision(task.text_precision, key="task.text_precision", trains=live)
    expect = cache_hashes(codec.autoencoder, None if live else towers)
    if task.cache is not None:
        expect |= {} if features is None else {FEATURES: features.told}
        how = None if features is None else features.encode
        data = with_caches(data, task.cache, lambda data, folder: _cached(folder, data, codec, towers, expect, how))
    loader = training_data(data, train, seed, workers, expect=expect if data.cached else None)
    storage, whole = train.engine.frozen, isinstance(adapter, FullAdapter)
    pipeline = store_network(pipeline, storage, trains=whole, blocks=train.engine.blocks_on_device)
    words, later = ([], []) if whole and live else (towers, []) if live or not data.cached else ([], towers)
    store_beside(storage, codec.autoencoder, words, task.text_precision)
    preview, copies = _preview(adapter, pipeline)
    trained = adapter.attach(pipeline.network, towers)
    _go_on(adapter, trained, pipeline)
    pipeline.network.enable_gradient_checkpointing(task.gradient_checkpointing)
    encode_text = _live(towers) if live else text_encoder(towers)
    options = told_options(task.options, pipeline.network)
    objective = DenoiseObjective(
        trained, pipeline.process, codec, encode_text, options, live=live, below=pipeline.network
    )
    objective.to(dist.device())
    store_beside(storage, None, later, task.text_precision)  # the empty prompt is as the cache's captions are

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        write_export(task.base, adapter, weights, folder, task.options.concat)
        if folder.name == "export":  # `ldm export` writes elsewhere, where there is no run to show
            write_page(folder.parent, images, task.samples.prompts)

    kept = preserving(task.preserve, task.words(data), objective, adapter, trained, encode_text)
    return Assembly(
        kept, loader, [FinetuneSamples(sized(task.samples, preview.network, data), preview, copies, drawn)], export
    )


def preserving(
    config: Preserve | None,
    words: tuple[str, str],
    objective: DenoiseObjective,
    adapter: AnyAdapter,
    trained: nn.Module,
    encode_text: EncodeText,
) -> Objective:
    """The loss with the second term, where one is asked for. Raises ValueError without an adapter to leave out."""
    if config is None:
        return objective
    if not isinstance(trained, LoraNet) or adapter.trains_text:
        raise ValueError("task.preserve: needs a LoRA, and text encoders that do not train (task.adapter.text: false)")
    if config.kind == "class":
        trigger, word = config.trigger or words[0], words[1] if config.word is None else config.word
        if not trigger or not word:
            key = "word" if trigger else "trigger"
            raise ValueError(f"task.preserve.{key}: missing; kind class says the class's word in the trigger's place")
        config = replace(config, trigger=trigger, word=word)
    return PreservingObjective(objective, config, trained.disabled, encode_text).to(dist.device())


class FinetuneSamples:
    """Sample pictures of the model as it trains; `copies` of text towers that train are brought up to date first."""

    on_demand = True

    def __init__(
        self,
        config: Samples,
        pipeline: TextToImage,
        copies: Sequence[TextEncoder],
        drawn: Callable[[Samples, TextToImage], SampleHook],
    ) -> None:
        self.every, self._copies = config.every, copies
        self._hook = drawn(config, pipeline)

    def __call__(self, trainer: Trainer, step: int) -> None:
        if self._copies and self._hook.config.prompts:
            weights = trainer.weights()  # ZeRO 3 divides a tower's weights, of which some are read without its hooks
            for i, tower in enumerate(self._copies):
                load_tower(tower, weights, i)
        self._hook(trainer, step)


def _preview(adapter: AnyAdapter, pipeline: TextToImage) -> tuple[TextToImage, list[TextEncoder]]:
    """What draws the samples: the pipeline itself, or one with copies of the towers if their own weights train."""
    if not (isinstance(adapter, FullAdapter) and adapter.trains_text):
        return pipeline, []
    other = copy.copy(pipeline)
    other.text = [copy.deepcopy(tower) for tower in pipeline.text]
    return other, other.text


def _go_on(adapter: AnyAdapter, trained: nn.Module, pipeline: TextToImage) -> None:
    """Begin with the corrections of a file, where one is named. Raises ValueError naming it."""
    if not isinstance(adapter, LoraAdapter | PivotalAdapter):
        return
    config = adapter.config if isinstance(adapter, LoraAdapter) else adapter.config.lora
    if config.start is None:
        return
    try:
        found = read_lora(config.start, pipeline.network, pipeline.text)
        if isinstance(adapter, PivotalAdapter):
            assert isinstance(trained, Pivotal)
            adapter.load(trained, found)
        else:
            assert isinstance(trained, LoraNet)
            adapter.load(trained, found)
    except ValueError as error:
        raise ValueError(f"task.adapter.start {config.start!r}: {error}") from None


def _live(towers: Sequence[TextEncoder]) -> EncodeText:
    """Prompts -> Cond with gradients."""

    def encode(prompts: Sequence[str]) -> Cond:
        return encode_texts(towers, prompts)

    return encode


def _cached(
    folder: Path,
    data: DataConfig,
    codec: LatentCodec,
    towers: Sequence[TextEncoder],
    hashes: dict[str, str],
    features: Callable[[Tensor], Tensor] | None = None,
) -> Path:
    """Encode pictures, and captions if the hashes name the text, into a folder; all ranks share the work."""
    config = EncodeConfig(
        path=data.path, splits=(data.split,), size=data.size, fit=data.fit, crop=data.crop, flip=data.flip,
        variants=enough(data.pairs, 2 if data.flip else 1), template=data.template, trigger=data.trigger,
        dtype="float32", part=16, buckets=data.buckets, require_captions=data.require_captions, pairs=data.pairs,
    )  # fmt: skip
    encode_text = text_encoder(towers)
    encode(
        config,
        folder,
        moments=codec.moments,
        text=(lambda texts: dict(encode_text(texts))) if "text" in hashes else None,
        hashes=hashes,
        features=features,
        rank=dist.rank(),
        world=dist.world_size(),
    )
    dist.barrier()
    if dist.rank() == 0:
        finish(config, folder)
    dist.barrier()
    return folder


def job(task: FinetuneTask, data: Data, train: TrainConfig, asked: planned.Asked) -> Job:
    """The base model with its adapter on captioned pictures."""
    found = adapted_job(task, task.adapter, data, train, asked)
    count = None if task.images is None else planned.pictures_in(task.images)
    return found if found.samples is not None or count is None else planned.told(found, count)


def adapted_job(task: Finetuning, config: AnyConfig, data: Data, train: TrainConfig, asked: planned.Asked) -> Job:
    """A base model with an adapter, counted from its loss: the network is frozen beside a LoRA or new tokens."""
    how, said = granularity(task.gradient_checkpointing), list[str]()
    base = planned_models.whole(task.base, "task.base", said)
    base.process = trained_process(task, base)
    options = told_options(task.options, base.network)
    held_in, whole, told = train.engine.frozen, isinstance(config, FullConfig), task.options.concat
    base = concat.widened(told, base) if whole else base
    title = f"task.base {task.base!r}: its {base.network.title}"
    concat.check(told, base.network.config, base.network.in_channels, base.codec, data, title)
    check_masks(task.options.mask, task.masks, data)
    concat.check_samples(told, task.samples.prompts, task.samples.pictures, task.samples.masks)
    planned.fits(base, data, "task.base", task.base, concat.more(told, base.codec))
    live = make_adapter(config).trains_text
    check_text_precision(task.text_precision, [t.config for t in base.text], "task.text_precision", trains=live)

    held = planned.copied(base)
    streamed = None if whole else planned_frozen.network(held.network, train.engine)

    def build(recompute: bool) -> nn.Module:
        model, adapter = planned.copied(held), make_adapter(config)
        trained = adapter.attach(model.network, model.text)
        model.network.enable_gradient_checkpointing(planned.again(how, recompute))
        encode = _live(model.text) if live else planned.states(base)
        return planned.Loss(
            DenoiseObjective(trained, model.process, model.codec, encode, options, live=live, below=model.network)
        )

    said += [] if task.preserve is None else ["task.preserve is not counted: its term takes as long again, and memory"]
    cached = task.cache is not None or data.cached
    said += planned.attention(asked.gpu) if live else []
    planned.check_cache(task.cache, cached, said, base.text)
    beside = planned.beside(base, data, cached, live, task.text_precision, held_in, whole and live)
    pictures = partial(concat.example, told, base.codec, planned.side(data))
    return planned.loss_job(
        asked, data, train, build, lambda batch: (planned.latents(base, data, batch) | pictures(batch),),
        frozen=concat.planned_frozen(told, beside, cached=cached),
        recompute=how != "none", said=said, cached=cached, streamed=streamed,
        reads=("moments", *([] if live else planned.TEXT), *pictures(1)), element=FLOAT32,
    )  # fmt: skip
