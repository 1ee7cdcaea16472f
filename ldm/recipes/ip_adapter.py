"""Train an IP-Adapter beside a frozen U-Net: pictures are prompts of themselves, or of what belongs to them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ldm import dist
from ldm.adapters.image_prompt import ImagePromptAdapter
from ldm.checkpoint import ip_adapter_files
from ldm.checkpoint.vision import is_image_encoder, vision_settings
from ldm.data.decode import load
from ldm.data.loader import DataConfig
from ldm.data.mixture import Data
from ldm.models.families import check_ip_adapter
from ldm.models.frozen import store, stored_bytes
from ldm.models.network import granularity
from ldm.models.shipped import named
from ldm.models.text import check_text_precision
from ldm.models.text.vision import ImageEncoder, Sight, VisionConfig, build_vision
from ldm.models.unet.image_prompt import STATES, IPAdapter, IPAdapterConfig, Kind
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.objectives.image_prompt import REFERENCE, ImagePromptObjective
from ldm.pipeline import ImagePrompt, TextToImage
from ldm.plan.flops import count_flops
from ldm.plan.report import Frozen, Job
from ldm.recipes import planned, planned_frozen, planned_models
from ldm.recipes.base import Assembly
from ldm.recipes.finetune import FLOAT32, CachedFeatures, Finetuning, assembled, only_source, open_base, trained_process
from ldm.recipes.pictures import prepare
from ldm.recipes.sources import load_image_encoder, weights_hash
from ldm.recipes.text_to_image import SampleHook, Samples, Sees, told_options
from ldm.recipes.validation import share_of
from ldm.rng import seed_torch
from ldm.train.trainer import TrainConfig

VIT_H = VisionConfig(hidden_size=1280, intermediate_size=5120, projection_dim=1024, num_hidden_layers=32,
                     num_attention_heads=16, patch_size=14, hidden_act="gelu")  # fmt: skip
"""The image encoder of most published IP-Adapters (`models/image_encoder`)."""


@dataclass(frozen=True, kw_only=True)
class IPAdapterTask(Finetuning):
    """Train an IP-Adapter on captioned pictures, whose prompt is the picture itself, or the pair `reference` of
    `data.pairs`.

    `image_encoder`: a folder of transformers', `clip_emoji`, a CLIP trained here or `open_clip:ARCH:WEIGHTS`. `form`:
    "plain" tells the embedding of the whole picture, "plus" what the encoder has of its places. `tokens` that it makes
    of them; None: 4, of "plus" 16. `start`: an IP-Adapter that trains further; None: keys and values are at first those
    of the text. With `images`, a folder, they are written as the shards of `data.path` first. `drop_image`: share of
    pictures that are left out, `drop_both` of it together with the caption, which `options.drop` drops (0.1, 0.05 and
    0.1: each alone for 5 %, both for 5 %, as published). `references`: pictures that the sample prompts are drawn
    with, one a prompt, at scale 1. `sensitivity`: as in the task controlnet.
    """

    kind: Literal["ip_adapter"] = "ip_adapter"
    image_encoder: str = "clip_emoji"
    form: Kind = "plain"
    tokens: int | None = None
    start: str | None = None
    images: Path | None = None
    options: DenoiseOptions = field(default_factory=lambda: DenoiseOptions(drop=0.1))
    drop_image: float = 0.1
    drop_both: float = 0.05
    references: tuple[Path, ...] = ()
    sensitivity: int | None = None

    def __post_init__(self) -> None:
        for name in ("drop_image", "drop_both"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        least = min(self.drop_image, self.options.drop)
        if self.drop_both > least:
            raise ValueError(f"drop_both: {self.drop_both} is part of drop_image {self.drop_image} and of options.drop "
                             f"{self.options.drop}; at most {least}")  # fmt: skip
        if self.drop_image + self.options.drop - self.drop_both > 1:
            raise ValueError(f"drop_image: {self.drop_image} with options.drop {self.options.drop} and drop_both "
                             f"{self.drop_both} is more than all samples")  # fmt: skip
        if self.options.drop_warmup:
            raise ValueError("options.drop_warmup: captions and pictures are dropped together here; write 0")
        if self.options.small is not None:
            raise ValueError("options.small: an IP-Adapter sees whole pictures only; write null")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if self.tokens not in (None, 4) and self.form == "plain":
            raise ValueError(f"tokens: {self.tokens}, but published files of form plain have 4, and diffusers reads no "
                             "others; write null, or form: plus")  # fmt: skip
        if self.sensitivity is not None and self.sensitivity < 0:
            raise ValueError(f"sensitivity must be at least 0 steps, got {self.sensitivity}")
        if len(self.references) != len(self.samples.prompts):
            raise ValueError(
                f"references: {len(self.references)} pictures for {len(self.samples.prompts)} samples.prompts; give "
                "one for each"
            )


def build(task: IPAdapterTask, data: Data, train: TrainConfig, seed: int, workers: int) -> Assembly:
    """The frozen base with its IP-Adapter, on pictures that are prompts of themselves."""
    every = _every(task, train)
    pipeline, encoder = open_base(task, None, train), load_image_encoder(task.image_encoder)
    seed_torch(seed)
    adapter = started(task, pipeline, encoder)
    if task.images is not None:
        source = only_source(data)
        prepare(task.images, Path(source.path), None, source.size, share_of(train, data), task.masks)
    encoder.to(dist.device())
    states = adapter.config.sees_states
    features = CachedFeatures(lambda x: encoder(encoder.fitted((x + 1) / 2), states=states), told(encoder, states))

    def drawn(samples: Samples, preview: TextToImage) -> SampleHook:
        return SampleHook(samples, preview, References(task, preview, adapter, encoder) if task.references else None)

    made = assembled(
        task, ImagePromptAdapter(adapter, task.image_encoder), pipeline, data, train, seed, workers, task.images,
        drawn=drawn, features=None if _has_references(data) else features,
    )  # fmt: skip
    assert isinstance(made.objective, DenoiseObjective)
    store(encoder, train.engine.frozen)
    loss = ImagePromptObjective(made.objective, encoder, states, task.drop_image, task.drop_both, every)
    return replace(made, objective=loss.to(dist.device()))


def told(encoder: ImageEncoder, states: bool) -> str:
    """What a cache with the encoder's features must have been made with."""
    digest = hashlib.blake2b(f"{weights_hash(encoder.model)} {encoder.sight} {states}".encode(), digest_size=8)
    return f"{Path(encoder.name).name}:{digest.hexdigest()}"


def _has_references(data: Data) -> bool:
    """Whether the samples have pictures of their own to be prompts."""
    return any(REFERENCE in one.pairs for one in ([data] if isinstance(data, DataConfig) else
                                                  [s.data for s in data.sources]))  # fmt: skip


def _every(task: IPAdapterTask, train: TrainConfig) -> int:
    if task.sensitivity is None:
        return train.log.every
    if task.sensitivity % train.log.every:
        raise ValueError(f"task.sensitivity: {task.sensitivity} is no multiple of train.log.every {train.log.every}, "
                         "so it would be measured and not logged")  # fmt: skip
    return task.sensitivity


def started(task: IPAdapterTask, base: TextToImage, encoder: ImageEncoder) -> IPAdapter:
    """The IP-Adapter that trains, in float32. Raises ValueError for a start that fits neither, and for no U-Net."""
    if task.start is None:
        try:
            return IPAdapter.beside(base.network, encoder.of(task.form != "plain"), task.form, task.tokens)
        except ValueError as error:
            raise ValueError(f"task.base {task.base!r}: {error}") from error
    adapter = ip_adapter_files.load_ip_adapter(named(task.start))
    _check_start(task, adapter.config, base, encoder.of(adapter.config.sees_states))
    return adapter


def _check_start(task: IPAdapterTask, config: IPAdapterConfig, base: TextToImage, features: int) -> None:
    check_ip_adapter(config, base.network.config, f"task.start {task.start!r}", f"task.base {task.base!r}")
    if config.kind != task.form:
        raise ValueError(f"task.form: {task.form!r}, but task.start {task.start!r} is of form {config.kind!r}")
    if config.features != features:
        raise ValueError(f"task.image_encoder {task.image_encoder!r} gives {features} features, but task.start "
                         f"{task.start!r} takes {config.features}")  # fmt: skip


class References(Sees):
    """The pictures that the sample prompts are drawn with, each its own."""

    def __init__(self, task: IPAdapterTask, base: TextToImage, adapter: IPAdapter, encoder: ImageEncoder) -> None:
        self._base, self._adapter, self._encoder = base, adapter, encoder
        self._pictures = [load(path) for path in task.references]

    def under(self, indices: Sequence[int]) -> TextToImage:
        """The pipeline that draws the prompts of these places."""
        pictures = [self._pictures[i] for i in indices]
        prompt = ImagePrompt(
            adapter=self._adapter, encoder=self._encoder, picture=pictures, each=True, name="task.references"
        )
        return self._base.image_prompted([prompt])


def job(task: IPAdapterTask, data: Data, train: TrainConfig, asked: planned.Asked) -> Job:
    """The base, frozen, with an IP-Adapter that trains, counted from its loss, and the image encoder."""
    every = _every(task, train)
    how, said = granularity(task.gradient_checkpointing), list[str]()
    base = planned_models.whole(task.base, "task.base", said)
    base.process = trained_process(task, base)
    options = told_options(task.options, base.network)
    planned.fits(base, data, "task.base", task.base)
    check_text_precision(task.text_precision, [t.config for t in base.text], "task.text_precision")
    encoder = _planned_encoder(task, said)
    config = _planned_config(task, base, encoder)
    held = planned.copied(base)
    streamed = planned_frozen.network(held.network, train.engine)

    def build(recompute: bool) -> nn.Module:
        model = planned.copied(held)
        with torch.device("meta"):
            adapter = IPAdapter(config)
        trained = ImagePromptAdapter(adapter, task.image_encoder).attach(model.network, model.text)
        model.network.enable_gradient_checkpointing(planned.again(how, recompute))
        return planned.Loss(
            DenoiseObjective(trained, model.process, model.codec, planned.states(base), options, below=model.network)
        )

    def inputs(batch: int) -> tuple[Any, ...]:
        places = [encoder.places()] if config.sees_states else []
        states = torch.empty(batch, *places, config.features, device="meta")
        return (planned.latents(base, data, batch) | {STATES: states},)

    cached = task.cache is not None or data.cached
    planned.check_cache(task.cache, cached, said, base.text)
    kept = task.cache is not None and not _has_references(data)
    frozen = planned.beside(base, data, cached, False, task.text_precision, train.engine.frozen)
    frozen.append(_frozen(encoder, config.sees_states, train, runs=not kept))
    found = planned.loss_job(
        asked, data, train, build, inputs, frozen=frozen, recompute=how != "none", said=said, cached=cached,
        streamed=streamed, asked_again=2 / every if every else 0.0, element=FLOAT32,
        reads=("moments", *planned.TEXT, *([STATES] if kept else [])),
    )  # fmt: skip
    count = None if task.images is None else planned.pictures_in(task.images)
    return found if found.samples is not None or count is None else planned.told(found, count)


def _planned_encoder(task: IPAdapterTask, said: list[str]) -> ImageEncoder:
    """The image encoder without its weights where it is a large one."""
    folder = named(task.image_encoder)
    if not is_image_encoder(folder) and ":" not in task.image_encoder and not folder.exists():
        said.append(f"task.image_encoder: {task.image_encoder!r} is not here; counted as ViT-H/14")
    elif not is_image_encoder(folder):
        return load_image_encoder(task.image_encoder).to("meta")
    config = vision_settings(folder) if is_image_encoder(folder) else VIT_H
    with torch.device("meta"):
        return ImageEncoder(build_vision(config), Sight(config.image_size), task.image_encoder)


def _frozen(encoder: ImageEncoder, states: bool, train: TrainConfig, runs: bool) -> Frozen:
    pixels = torch.empty(1, 3, encoder.sight.size, encoder.sight.size, device="meta")
    flops = count_flops(lambda x: encoder(x, states=states), pixels) if runs else 0.0
    return Frozen(name="image encoder", bytes=float(stored_bytes(encoder, train.engine.frozen)), flops=float(flops))


def _planned_config(task: IPAdapterTask, base: TextToImage, encoder: ImageEncoder) -> IPAdapterConfig:
    config = None
    if task.start is not None and ip_adapter_files.ip_adapter_in(named(task.start)) is not None:
        config = ip_adapter_files.open_ip_adapter(named(task.start))[0]
        _check_start(task, config, base, encoder.of(config.sees_states))
    features = encoder.of(task.form != "plain")
    return config or IPAdapterConfig.of(base.network.config, features, task.form, task.tokens)
