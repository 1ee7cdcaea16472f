"""Train a ControlNet over a frozen base: what the network is shown comes from the data's pair `condition`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm import dist
from ldm.adapters.control import ControlAdapter
from ldm.checkpoint import control_files
from ldm.data.decode import load
from ldm.data.loader import DataConfig
from ldm.data.mixture import Data
from ldm.models.families import check_control
from ldm.models.network import granularity
from ldm.models.text import check_text_precision
from ldm.models.transformers.flux_control import FluxControlConfig
from ldm.models.transformers.sd3 import SD3Config
from ldm.models.transformers.sd3_control import SD3ControlConfig, SD3ControlNet
from ldm.models.unet.controlnet import CONDITION, ControlNet, ControlNetConfig
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.control import ControlObjective, LatentControlObjective
from ldm.objectives.denoise import DenoiseObjective
from ldm.pipeline import Control, TextToImage
from ldm.pipeline.control import as_condition
from ldm.plan.flops import count_flops
from ldm.plan.report import Frozen, Job
from ldm.recipes import planned, planned_frozen, planned_models
from ldm.recipes.base import Assembly
from ldm.recipes.finetune import FLOAT32, Finetuning, assembled, only_source, open_base, trained_process
from ldm.recipes.pictures import prepare
from ldm.recipes.text_to_image import SampleHook, Samples, Sees, told_options
from ldm.recipes.validation import share_of
from ldm.rng import seed_torch
from ldm.train.trainer import TrainConfig


@dataclass(frozen=True, kw_only=True)
class ControlTask(Finetuning):
    """Train a ControlNet on captioned pictures and their conditions, the pair `condition` of `data.pairs`.

    `start`: a ControlNet that trains further; None: a copy of the base's encoder that adds nothing yet. `channels` of
    the condition that the copy is shown. `layers`: of a Stable Diffusion 3 base, its first blocks that are copied;
    None: half of them. With `images`, a folder, they are written as the shards of `data.path` first.
    `conditions`: pictures that the sample prompts are drawn under, one a prompt, at scale 1. `sensitivity`: every so
    many steps the loss with the right condition minus that with another's is logged; None: as often as the log is
    written, 0: never. Half of the captions are dropped as in the paper with `options.drop` 0.5.
    """

    kind: Literal["controlnet"] = "controlnet"
    start: str | None = None
    channels: int = 3
    layers: int | None = None
    images: Path | None = None
    conditions: tuple[Path, ...] = ()
    sensitivity: int | None = None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"channels: a condition has 1 or 3, got {self.channels}")
        if self.sensitivity is not None and self.sensitivity < 0:
            raise ValueError(f"sensitivity must be at least 0 steps, got {self.sensitivity}")
        if self.options.concat is not None:
            raise ValueError("options.concat: a ControlNet's base is told no picture itself; write null")
        if self.options.small is not None:
            raise ValueError("options.small: a ControlNet is shown whole pictures only; write null")
        if len(self.conditions) != len(self.samples.prompts):
            raise ValueError(
                f"conditions: {len(self.conditions)} pictures for {len(self.samples.prompts)} samples.prompts; give "
                "one for each"
            )


def build(task: ControlTask, data: Data, train: TrainConfig, seed: int, workers: int) -> Assembly:
    """The frozen base under its ControlNet, on pictures and conditions."""
    check_data(task, data)
    every = _every(task, train)
    pipeline = open_base(task, None, train)
    seed_torch(seed)
    control = started(task, pipeline)
    if task.images is not None:
        source = only_source(data)
        prepare(task.images, Path(source.path), None, source.size, share_of(train, data), task.masks)

    def drawn(samples: Samples, preview: TextToImage) -> SampleHook:
        return SampleHook(samples, preview, Conditions(task, samples, preview, control) if task.conditions else None)

    made = assembled(task, ControlAdapter(control), pipeline, data, train, seed, workers, task.images, drawn=drawn)
    assert isinstance(made.objective, DenoiseObjective)
    control.enable_gradient_checkpointing(task.gradient_checkpointing)
    if isinstance(control, SD3ControlNet):
        loss: ControlObjective = LatentControlObjective(made.objective, every, latents_for(control, pipeline.codec))
    else:
        loss = ControlObjective(made.objective, every)
    return replace(made, objective=loss.to(dist.device()))


def latents_for(control: SD3ControlNet, codec: LatentCodec) -> Callable[[Tensor], Tensor]:
    """What makes of pixels (B, 3, H, W) in [0, 1], or moments (B, 2 Z, h, w), the latents that it is shown.

    The mode of the posterior, as it is drawn under.
    """
    shift = codec.shift * codec.scale

    def shown(value: Tensor) -> Tensor:
        if value.shape[1] == control.picture_channels:
            return control.shown(value, codec.encode, shift)
        return control.shifted(codec.sample(value), shift)

    return shown


def check_data(task: ControlTask, data: Data) -> None:
    """Raise ValueError for data without conditions."""
    for source in [data] if isinstance(data, DataConfig) else [s.data for s in data.sources]:
        if CONDITION not in source.pairs:
            raise ValueError(
                f"data.pairs: no {CONDITION!r} for a ControlNet to be shown, only {sorted(source.pairs)}; such as "
                "condition: {kind: canny}, or {kind: stored} for pictures that are stored beside"
            )


def _every(task: ControlTask, train: TrainConfig) -> int:
    if task.sensitivity is None:
        return train.log.every
    if task.sensitivity % train.log.every:
        raise ValueError(f"task.sensitivity: {task.sensitivity} is no multiple of train.log.every {train.log.every}, "
                         "so it would be measured and not logged")  # fmt: skip
    return task.sensitivity


def started(task: ControlTask, base: TextToImage) -> ControlNet | SD3ControlNet:
    """The ControlNet that trains, in float32. Raises ValueError for a start of another family, and for no such base."""
    if task.start is None:
        try:
            if _of_sd3(task, base):
                return SD3ControlNet.copy_of(base.network, task.layers)
            return ControlNet.copy_of(base.network, base.codec.factor, task.channels)
        except ValueError as error:
            raise ValueError(f"task.base {task.base!r}: {error}") from error
    control = control_files.load_control(task.start)
    _check_start(task, control.config, base)
    assert isinstance(control, ControlNet | SD3ControlNet)
    return control


def _of_sd3(task: ControlTask, base: TextToImage) -> bool:
    """Whether the base is Stable Diffusion 3. Raises ValueError for settings of the other kind."""
    sd3 = isinstance(base.network.config, SD3Config)
    if sd3 and task.channels != 3:
        raise ValueError(f"task.channels: {task.channels}, but its ControlNets see latents of pictures of 3; write 3")
    if not sd3 and task.layers is not None:
        raise ValueError(f"task.layers: {task.layers} is of Stable Diffusion 3; a U-Net's whole encoder is copied")
    return sd3


def _check_start(task: ControlTask, config: control_files.AnyConfig, base: TextToImage) -> None:
    check_control(config, base.network.config, f"task.start {task.start!r}", f"task.base {task.base!r}")
    if isinstance(config, FluxControlConfig):
        raise ValueError(f"task.start {task.start!r}: ControlNets of FLUX.1 are drawn under, not trained")
    if _of_sd3(task, base) and task.layers is not None:
        raise ValueError(f"task.layers: {task.layers}, but task.start has its own layers; write null")
    if isinstance(config, ControlNetConfig) and config.factor != base.codec.factor:
        raise ValueError(f"task.start {task.start!r}: is shown pictures of {config.factor} times the latents' side, "
                         f"but the base's are {base.codec.factor} times")  # fmt: skip


class Conditions(Sees):
    """What the sample prompts are drawn under, each its own."""

    def __init__(
        self, task: ControlTask, samples: Samples, base: TextToImage, control: ControlNet | SD3ControlNet
    ) -> None:
        self._base, self._control = base, control
        size, channels = base.size(samples.settings.size), control.picture_channels
        self._pictures = torch.stack([as_condition(load(p, stencil=True), size, channels) for p in task.conditions])

    def under(self, indices: Sequence[int]) -> TextToImage:
        """The pipeline that draws the prompts of these places."""
        pictures = self._pictures[list(indices)]
        return self._base.controlled([Control(network=self._control, picture=pictures, name="task.conditions")])


def job(task: ControlTask, data: Data, train: TrainConfig, asked: planned.Asked) -> Job:
    """The base, frozen, under a ControlNet that trains, counted from its loss."""
    check_data(task, data)
    every = _every(task, train)
    how, said = granularity(task.gradient_checkpointing), list[str]()
    base = planned_models.whole(task.base, "task.base", said)
    base.process = trained_process(task, base)
    options = told_options(task.options, base.network)
    planned.fits(base, data, "task.base", task.base)
    check_text_precision(task.text_precision, [t.config for t in base.text], "task.text_precision")
    config = _planned_config(task, base)
    held = planned.copied(base)
    streamed = planned_frozen.network(held.network, train.engine)

    def build(recompute: bool) -> nn.Module:
        model = planned.copied(held)
        with torch.device("meta"):
            control = SD3ControlNet(config) if isinstance(config, SD3ControlConfig) else ControlNet(config)
        trained = ControlAdapter(control).attach(model.network, model.text)
        for network in (model.network, control):
            network.enable_gradient_checkpointing(planned.again(how, recompute))
        return planned.Loss(
            DenoiseObjective(trained, model.process, model.codec, planned.states(base), options, below=model.network)
        )

    def inputs(batch: int) -> tuple[Any, ...]:
        side, channels = planned.side(data), task.channels
        if isinstance(config, SD3ControlConfig):
            side, channels = side // base.codec.factor, config.in_channels
        elif isinstance(config, ControlNetConfig):
            channels = config.conditioning_channels
        shown = torch.empty(batch, channels, side, side, device="meta")
        return (planned.latents(base, data, batch) | {CONDITION: shown},)

    cached = task.cache is not None or data.cached
    planned.check_cache(task.cache, cached, said, base.text)
    frozen = planned.beside(base, data, cached, False, task.text_precision, train.engine.frozen)
    stored, encoded = _planned_condition(data, base, inputs(1)[0][CONDITION], cached)
    found = planned.loss_job(
        asked, data, train, build, inputs,
        frozen=[*frozen, *encoded], recompute=how != "none", said=said, cached=cached, streamed=streamed,
        asked_again=2 / every if every else 0.0, stored=stored, element=FLOAT32,
    )  # fmt: skip
    count = None if task.images is None else planned.pictures_in(task.images)
    return found if found.samples is not None or count is None else planned.told(found, count)


def _planned_condition(data: Data, base: TextToImage, shown: Tensor, cached: bool) -> tuple[float, list[Frozen]]:
    """Bytes of a condition in a cache, and the encoder where it runs in training: for latents that are in none."""
    pairs = data.pairs if isinstance(data, DataConfig) else data.sources[0].data.pairs
    side = planned.side(data)
    pair = pairs[CONDITION]
    if cached and pair.cache == "latents":
        return 2.0 * FLOAT32 * base.codec.channels * (side // base.codec.factor) ** 2, []
    stored = float((1 if pair.kind in ("canny", "grey") else 3) * side**2)  # equal channels are stored once
    if shown.shape[-1] == side:
        return stored, []
    flops = count_flops(base.codec.autoencoder.encode, torch.empty(1, 3, side, side, device="meta"))
    return stored, [Frozen(name="condition", bytes=0.0, flops=float(flops))]


def _planned_config(task: ControlTask, base: TextToImage) -> ControlNetConfig | SD3ControlConfig:
    try:
        config = None if task.start is None else control_files.open_control(task.start)[0]
    except ValueError:  # plans need no weights to start from
        config = None
    if config is None:
        if _of_sd3(task, base):
            return SD3ControlConfig.of(base.network.config, task.layers)  # type: ignore[arg-type]
        return ControlNetConfig.of(base.network.config, base.codec.factor, task.channels)
    _check_start(task, config, base)
    assert isinstance(config, ControlNetConfig | SD3ControlConfig)
    return config
