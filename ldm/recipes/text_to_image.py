"""Train a denoising network on latents and text embeddings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm import dist
from ldm.checkpoint import files
from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.schedulers import flow_solver, scheduler_to_diffusers
from ldm.config.load import encode as plain
from ldm.data.encode import EncodeConfig, encode, finish
from ldm.data.loader import DataConfig
from ldm.data.mixture import Data, with_caches
from ldm.data.pairs import enough
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Flow
from ldm.models import networks
from ldm.models.concat import widened
from ldm.models.families import family_of
from ldm.models.fit import check_fit, given, told
from ldm.models.growing import check_growth, grown, with_free
from ldm.models.network import Granularity, Network, granularity
from ldm.models.networks import AnyNetwork
from ldm.models.text import T5Padding, TextEncoder, TextPrecision, check_text_precision, pad_with
from ldm.models.transformers.pixart import PixArtTransformer
from ldm.models.unet.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.align import without_projector
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.pipeline import TextToImage
from ldm.plan.flops import count_flops
from ldm.plan.report import Job
from ldm.progress import Bar
from ldm.recipes import concat, planned, planned_models
from ldm.recipes.aligning import AlignTarget, aligned, plan_lines
from ldm.recipes.base import Assembly
from ldm.recipes.frozen_parts import store_beside
from ldm.recipes.samples import SampleHook, Samples, Sees, sample_hook, sized, without_dropout
from ldm.recipes.smaller import check_pictures
from ldm.recipes.sources import (
    cache_hashes,
    load_autoencoder,
    load_network,
    load_towers,
    network_of,
    text_encoder,
    training_data,
)
from ldm.rng import seed_torch
from ldm.train.trainer import TrainConfig

__all__ = ["SampleHook", "Samples", "Sees", "TextToImageTask", "sample_hook", "sized", "without_dropout"]


@dataclass(frozen=True, kw_only=True)
class TextToImageTask:
    """`vae` and `text` name the frozen parts: a shipped model, a run's export, or a diffusers folder.

    `text_precision`: what the text encoders are kept and computed in; `t5_padding` "zero": T5 and the network are not
    told of its padding (SD3, FLUX.1; by pipelines they are). `start` names a model (a run, too) whose network
    is trained further, which `network` then is, also if it is left out; otherwise weights are random. With `grow`,
    `network` has more layers than `start`, which do nothing at first. With `cache`, a folder, pictures and captions are
    encoded once before training; without it at every step. `gradient_checkpointing` trades a second forward for memory:
    of each "block" (true), each "transformer" block alone, or "none" (false).
    """

    kind: Literal["text_to_image"] = "text_to_image"
    network: AnyNetwork | None = None
    vae: str
    text: str
    text_precision: TextPrecision = "fp32"
    t5_padding: T5Padding = "unmodified"
    start: str | None = None
    grow: bool = False
    process: Process = field(default_factory=Process)
    options: DenoiseOptions = field(default_factory=DenoiseOptions)
    cache: Path | None = None
    gradient_checkpointing: bool | Granularity = False
    samples: Samples = field(default_factory=Samples)

    def __post_init__(self) -> None:
        if self.network is None and self.start is None:
            raise ValueError("network: missing; give a network, or `start`, a model whose network trains further")
        if self.grow and (self.start is None or self.network is None):
            raise ValueError("grow: true needs `start`, a model, and `network`, the same with more layers")


def settled(task: TextToImageTask) -> TextToImageTask:
    """With the network that trains: that of `start` where there is one.

    Its size of pictures, which is no part of the network, may be written otherwise. Raises ValueError naming both for
    another network, or for a start that is not there and no network.
    """
    if task.start is None:
        return task
    try:
        own = concat.wide_config(task.options.concat, network_of(task.start))
    except ValueError as error:
        if task.network is not None:  # plans and exports need no weights to start from
            return task
        raise ValueError(f"task.start: {error}") from error
    if task.network is None:
        return replace(task, network=own)
    if task.grow:
        check_growth(own, task.network)
        return replace(task, network=with_free(task.network, own))
    if type(task.network) is not type(own):
        raise ValueError(f"task.network.kind: {task.network.kind!r}, but task.start {task.start!r} has a {own.kind!r}")
    free = {key: getattr(task.network, key, None) for key in ("sample_size", "dropout") if hasattr(own, key)}
    free = {key: getattr(own, key) if value is None else value for key, value in free.items()}
    written, its = plain(replace(task.network, **free)), plain(replace(own, **free))
    odd = [f"{k} {written.get(k)!r} for {its[k]!r}" for k in its if not _same(written.get(k), its[k])]
    if odd:
        raise ValueError(
            f"task.network: another network than that of task.start {task.start!r}, which is the one that trains: "
            f"{'; '.join(odd[:4])}{'; ...' if len(odd) > 4 else ''}. Leave task.network out (null), or task.start"
        )
    return replace(task, network=replace(own, **free))


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are equal; one value stands for a list of it, as for all levels of a network."""
    if isinstance(a, list) != isinstance(b, list):
        many, one = (a, b) if isinstance(a, list) else (b, a)
        return all(value == one for value in many)
    return a == b


def cached(
    folder: Path,
    data: DataConfig,
    codec: LatentCodec,
    towers: Sequence[TextEncoder],
    target: AlignTarget | None = None,
) -> Path:
    """Encode pictures and captions into a folder if they are not there yet; all ranks share the work.

    With a target also its features of the pictures.
    """
    config = EncodeConfig(
        path=data.path, splits=(data.split,), size=data.size, buckets=data.buckets, fit=data.fit, crop=data.crop,
        flip=data.flip, variants=enough(data.pairs, 2 if data.flip or data.crop == "random" else 1),
        template=data.template, trigger=data.trigger, part=512, require_captions=data.require_captions,
        pairs=data.pairs,
    )  # fmt: skip
    encode_text = text_encoder(towers)
    with Bar("encoding", "pictures") as bar:
        encode(
            config,
            folder,
            moments=codec.moments,
            text=lambda texts: dict(encode_text(texts)),
            hashes=hashes(codec.autoencoder, towers) | ({} if target is None else target.hashes),
            features=None if target is None else target.encode,
            rank=dist.rank(),
            world=dist.world_size(),
            progress=bar.update,
        )
    dist.barrier()
    if dist.rank() == 0:
        finish(config, folder)
    dist.barrier()
    return folder


def hashes(autoencoder: Autoencoder, towers: Sequence[TextEncoder]) -> dict[str, str]:
    """What a cache must have been made with."""
    return cache_hashes(autoencoder, towers)


def check_channels(network: Network, process: Process, codec: LatentCodec) -> None:
    """Raise ValueError unless the network answers one value for each latent channel, two with learned variance."""
    learned = process.variance == "learned"
    want = codec.channels * (2 if learned else 1)
    if network.out_channels != want:
        why = "mean and variance" if learned else "one value"
        raise ValueError(
            f"network.out_channels: {network.out_channels}, but process.variance {process.variance!r} needs "
            f"{want}: {why} for each of the autoencoder's {codec.channels} channels"
        )


def told_options(options: DenoiseOptions, network: Network) -> DenoiseOptions:
    """With the guidance scale that is usually told in training where the network is told one and none is given."""
    usual = family_of(network.config).guidance_told
    if options.guidance is not None or usual is None or network.guidance_width is None:
        return options
    return replace(options, guidance=usual)


def filled(network: Network, weights: Mapping[str, Tensor]) -> Network:
    """The network with trained weights, of all its parameters; tables that it computes itself stay.

    Raises RuntimeError for weights that are missing or unknown.
    """
    network.load_state_dict({**dict(network.named_buffers()), **weights}, strict=True)
    return network


def scheduler_for(process: Process, network: Network) -> dict[str, Any]:
    """The scheduler's config of a network that trained so. PixArt's pipelines drop the learned variance themselves.

    A U-Net's flow has a solver's, since Stable Diffusion's pipelines take no flow scheduler.
    """
    schedule, variance = process.schedule, "fixed" if isinstance(network, PixArtTransformer) else process.variance
    told = scheduler_to_diffusers(schedule, process.prediction, variance=variance)  # refuses what it cannot tell
    if isinstance(network, UNet) and isinstance(schedule, Flow) and schedule.dynamic is schedule.terminal is None:
        return flow_solver(schedule)
    return told


def _started(task: TextToImageTask, start: str) -> Network:
    """The network of `start`, with the channels of a picture that it is told from now on."""
    network = load_network(start)
    return widened(network, concat.wide_config(task.options.concat, network.config))


def build(task: TextToImageTask, data: Data, train: TrainConfig, seed: int, workers: int) -> Assembly:
    """The network, the frozen parts, the data (encoded once, if so configured) and sample pictures."""
    task.options.check(train.micro_batch(dist.world_size()))
    seed_torch(seed)  # initial weights
    device = dist.device()
    autoencoder = load_autoencoder(task.vae).to(device)
    towers = [t.to(device) for t in load_towers(task.text, task.text_precision)]
    pad_with(towers, task.t5_padding, "task.t5_padding")
    codec = LatentCodec.of(autoencoder)
    task = settled(task)
    assert task.network is not None
    network = networks.build(task.network) if task.start is None else _started(task, task.start)
    if task.grow:
        network = grown(network, task.network)
    network.config = task.network
    network.enable_gradient_checkpointing(task.gradient_checkpointing)
    check_channels(network, task.process, codec)
    planned.check_patches(network, codec.factor, data)
    check_pictures(task.options.small, network, codec.factor, data)
    check_fit(
        network.config, tuple(t.config for t in towers), codec.channels, text_key=f"task.text {task.text!r}",
        vae_key=f"task.vae {task.vae!r}", more=concat.more(task.options.concat, codec),
        network_key="task.network" if task.start is None else f"task.start's {network.title}",
    )  # fmt: skip
    concat.check(task.options.concat, network.config, network.in_channels, codec, data, f"the {network.title}")
    encode_text = text_encoder(towers)
    storage, caches = train.engine.frozen, task.cache is not None or data.cached
    store_beside(storage, None, [] if caches else towers, task.text_precision)
    options = told_options(task.options, network)
    alignment, target = aligned(options.align, network, device, caches)
    objective = DenoiseObjective(network, task.process, codec, encode_text, options, alignment=alignment).to(device)
    if task.cache is not None and not data.cached:
        data = with_caches(data, task.cache, lambda data, folder: cached(folder, data, codec, towers, target))
    expect = hashes(autoencoder, towers) | ({} if target is None else target.hashes) if data.cached else None
    store_beside(storage, autoencoder, towers if caches else [], task.text_precision)
    loader = training_data(data, train, seed, workers, expect=expect)
    pipeline = TextToImage(network, codec, towers, task.process)
    pipeline.augmentation = concat.augmentation(task.options.concat)

    def export(weights: dict[str, Tensor], folder: Path) -> None:
        whole = filled(networks.build(network.config), without_projector(weights))
        scheduler = scheduler_for(task.process, whole)
        text = towers if task.text_precision == storage == "fp32" else load_towers(task.text)
        vae = autoencoder if storage == "fp32" else load_autoencoder(task.vae)
        noise, vae = concat.augmentation(task.options.concat), concat.exported(task.options.concat, vae)
        save_diffusers(folder, network=whole, autoencoder=vae, text=text, scheduler=scheduler, augmentation=noise)
        files.write_text(folder / "trained.json", json.dumps({"steps": train.steps, "batch": train.batch}))

    return Assembly(
        objective, loader, [sample_hook(sized(task.samples, network, data), pipeline, task.options)], export
    )


def job(task: TextToImageTask, data: Data, train: TrainConfig, asked: planned.Asked) -> Job:
    """The network's own step; frozen parts run in it where nothing is cached."""
    said: list[str] = []
    settings = planned_models.network(task.network, None if task.grow else task.start, said)
    if task.start is not None and not task.grow:
        settings = concat.wide_config(task.options.concat, settings)
    vae, vae_settings = planned_models.vae(task.vae, settings, said)
    towers = planned_models.towers(task.text, settings, said)
    channels, configs = vae_settings.latent_channels, tuple(tower.config for tower in towers)
    codec = LatentCodec.of(vae)
    check_text_precision(task.text_precision, configs, "task.text_precision")
    how = granularity(task.gradient_checkpointing)

    def build(recompute: bool) -> Network:
        with torch.device("meta"):
            network = networks.build(settings).train()
        network.enable_gradient_checkpointing(planned.again(how, recompute))
        return network

    network = build(False)
    check_fit(
        settings, configs, channels, text_key=f"task.text {task.text!r}", vae_key=f"task.vae {task.vae!r}",
        network_key="task.network" if task.start is None else f"task.start's {network.title}",
        more=concat.more(task.options.concat, codec),
    )  # fmt: skip
    concat.check(task.options.concat, settings, network.in_channels, codec, data, f"the {network.title}")
    concat.check_samples(task.options.concat, task.samples.prompts, task.samples.pictures, task.samples.masks)
    pixels = planned.side(data)
    side = planned.check_size(pixels, vae.factor, "data.size")
    planned.check_patches(network, vae.factor, data)
    check_pictures(task.options.small, network, vae.factor, data)
    cached = task.cache is not None or data.cached
    planned.check_cache(task.cache, cached, said, towers)
    said += plan_lines(task.options.align, network, cached)
    if task.options.route is not None:
        said.append("options.route is not counted: steps are planned with all tokens")

    def inputs(batch: int) -> tuple[Any, ...]:
        batch *= task.options.repeats
        x = torch.empty(batch, network.in_channels, side, side, device="meta")
        return x, torch.empty(batch, device="meta"), told(network, configs, batch)

    encoded = 2.0 * (2 * channels * side * side + sum(value.numel() for value in given(configs).values()))
    encoded += concat.planned_bytes(task.options.concat, pixels, codec)
    beside = planned.frozen(vae, towers, pixels, cached, task.text_precision, train.engine.frozen)
    samples, size = planned.samples_of(data, encoded, cached, said)
    return Job(
        name=asked.name, build=build, inputs=inputs, flops=float(count_flops(network, *inputs(1))),
        batch=train.batch, steps=train.steps, layout=planned.layout(train, asked), recompute=how != "none",
        precision=planned.precision(train, asked.gpu),
        frozen=tuple(concat.planned_frozen(task.options.concat, beside, cached=cached)),
        samples=samples, sample_bytes=size, warnings=tuple(said),
    )  # fmt: skip
