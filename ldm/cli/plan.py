"""`ldm plan CONFIG`: memory, time and cost of a run before it is queued, counted without a GPU."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.config.schema import RunConfig
    from ldm.plan.memory import Layout
    from ldm.plan.report import Frozen, Job


def parser() -> argparse.ArgumentParser:
    """Options of the verb."""
    p = argparse.ArgumentParser(
        prog="ldm plan",
        description="Memory, throughput, time and cost of a run, and what would go wrong, without a GPU.",
    )
    p.add_argument("config", help="a YAML file, such as configs/train/text_to_image_emoji.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.batch=2048")
    p.add_argument("--nodes", type=int, default=1)
    p.add_argument("--gpus-per-node", type=int, default=8)
    p.add_argument("--gpu", default="a100-80g", help="a100-80g (default), a100-40g, h100, h200, v100-32g, l40s, ...")
    p.add_argument("--price", type=float, help="of one GPU for an hour, in any currency")
    p.add_argument("--inside", type=float, metavar="GB/s", help="link of a GPU within its node, one way")
    p.add_argument("--outside", type=float, metavar="GB/s", help="network of a node, one way, all ports together")
    p.add_argument("--samples", type=int, help="of the data, where it is not here")
    p.add_argument("--json", action="store_true", help="as JSON")
    p.add_argument("--page", type=Path, metavar="OUT.html", help="also write a page with figures")
    return p


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    args = parser().parse_intermixed_args(argv)
    if args.price is not None and args.price < 0:
        raise ValueError(f"--price must not be negative, got {args.price}")

    from ldm.config.schema import load_run
    from ldm.plan.hardware import find
    from ldm.plan.report import Planner, text
    from ldm.plan.throughput import Cluster

    hardware = find(args.gpu)
    links = {k: v for k, v in (("inside", args.inside), ("outside", args.outside)) if v is not None}
    cluster = Cluster(nodes=args.nodes, per_node=args.gpus_per_node, hardware=replace(hardware, **links))
    job = job_of(load_run(args.config, args.overrides), cluster.world, gpu=not hardware.host)
    if args.samples is not None:
        job = replace(job, samples=args.samples)
    plan = Planner(job, cluster, args.price).plan()
    print(json.dumps(plan.record(), indent=1) if args.json else text(plan))
    if args.page is not None:
        from ldm.web.plan import page

        page(plan).write(args.page)
        if not args.json:
            print(f"\n{args.page}: the same with figures")
    return 0


def job_of(config: RunConfig, world: int, *, gpu: bool) -> Job:
    """What the planner needs of a config. Raises ValueError for a task that it does not know."""
    from ldm.recipes.autoencoder import AutoencoderTask
    from ldm.recipes.text_to_image import TextToImageTask

    if isinstance(config.task, TextToImageTask):
        return _text_to_image(config, config.task, world, gpu)
    if isinstance(config.task, AutoencoderTask):
        return _autoencoder(config, config.task, world, gpu)
    raise ValueError(f"task.kind: {config.task.kind!r} cannot be planned; text_to_image and autoencoder can")


def _layout(config: RunConfig, world: int, gpu: bool) -> Layout:
    from ldm.plan.memory import Layout

    train, engine = config.train, config.train.engine
    return Layout(
        stage=engine.zero_stage,
        world=world,
        half=engine.precision == "fp16",
        copies=0 if train.ema is None else 1 + len(train.ema.others) + len(train.ema.power),
        bucket=engine.bucket,
        overlap=gpu,
        accumulate=train.accumulate,
        offload_optimizer=engine.offload_optimizer,
        offload_parameters=engine.offload_parameters,
    )


def _precision(config: RunConfig, gpu: bool) -> Any:
    import torch

    name = config.train.engine.precision
    if name == "auto":  # the GPUs of the plan have bf16; the CPU counts in float32
        name = "bf16" if gpu else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name] if gpu else torch.float32


def _text_to_image(config: RunConfig, task: Any, world: int, gpu: bool) -> Job:
    import torch
    from torch import nn

    from ldm.models.unet import UNet, granularity
    from ldm.plan.flops import count_flops
    from ldm.plan.report import Job

    said: list[str] = []
    vae, factor, channels = _vae(task.vae, said)
    towers, context, width, pooled = _text(task.text, said)
    unet, chosen = task.unet, granularity(task.gradient_checkpointing)
    how = "block" if chosen == "none" else chosen  # what a plan that recomputes would have
    pixels = _pixels(config, (unet.sample_size or 64) * factor)
    side = pixels // factor
    cached = task.cache is not None or _cached(config)
    if task.cache is not None and not (Path(task.cache) / "manifest.json").is_file():
        said.append(f"task.cache: nothing in {str(task.cache)!r} yet: the run encodes everything first, once")
    if not cached:
        said.append("no cache: VAE and text tower run for every image of every step; set task.cache to encode once")

    def build(recompute: bool) -> nn.Module:
        with torch.device("meta"):
            module = UNet(unet).train()
        module.enable_gradient_checkpointing(how if recompute else "none")
        return module

    def inputs(batch: int) -> tuple[Any, ...]:
        cond = {"text": torch.empty(batch, context, unet.per_level("cross_attention_dim")[0], device="meta")}
        if unet.addition_embed_type:
            cond |= {
                "pooled": torch.empty(batch, pooled, device="meta"),
                "time_ids": torch.empty(batch, 6, device="meta"),
            }
        return (
            torch.empty(batch, unet.in_channels, side, side, device="meta"),
            torch.empty(batch, device="meta"),
            cond,
        )

    frozen = _frozen(vae, towers, pixels, context, cached)
    samples, size = _data(config, 2.0 * (2 * channels * side * side + context * width + pooled), cached, said)
    return Job(
        name=config.name,
        build=build,
        inputs=inputs,
        flops=float(count_flops(build(False), *inputs(1))),
        batch=config.train.batch,
        steps=config.train.steps,
        layout=_layout(config, world, gpu),
        recompute=chosen != "none",
        precision=_precision(config, gpu),
        frozen=tuple(frozen),
        samples=samples,
        sample_bytes=size,
        warnings=tuple(said),
    )


def _frozen(vae: Any, towers: list[Any], pixels: int, context: int, cached: bool) -> list[Frozen]:
    """The networks that stay on the GPU beside the trained one; they run for each image where nothing is cached."""
    import torch

    from ldm.plan.flops import count_flops
    from ldm.plan.report import Frozen

    def weight(module: Any) -> float:
        return 4.0 * sum(p.numel() for p in module.parameters())

    vae_flops = 0 if cached else count_flops(vae.encode, torch.empty(1, 3, pixels, pixels, device="meta"))
    found = [Frozen(name="vae", bytes=weight(vae), flops=float(vae_flops))]
    for i, tower in enumerate(towers):
        tokens = torch.zeros(1, context, dtype=torch.int64, device="meta")
        flops = 0 if cached else count_flops(tower.model, tokens)
        found.append(Frozen(name=f"text {i + 1}", bytes=weight(tower), flops=float(flops)))
    return found


def _vae(source: str, said: list[str]) -> tuple[Any, int, int]:
    """The autoencoder without weights, its factor and channels; a preset's where its folder is not here."""
    import torch

    from ldm.config.load import decode
    from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
    from ldm.models.presets import AUTOENCODERS

    tree = _json(source, ("vae/config.json", "config.json"))
    if tree is None:
        name = source if source in AUTOENCODERS else "kl_f8"
        if name != source:
            said.append(f"task.vae: {source!r} is not here; planned as the usual autoencoder, kl_f8")
        settings = AUTOENCODERS[name]
    else:
        settings = decode(AutoencoderConfig, tree, f"{source}: config.json")
    with torch.device("meta"):
        vae = Autoencoder(settings)
    return vae.requires_grad_(False).eval(), vae.factor, settings.latent_channels


def _text(source: str, said: list[str]) -> tuple[list[Any], int, int, int]:
    """Text towers without weights; tokens, width of their states, width of the pooled vector."""
    import torch

    from ldm.models.presets import TEXTS
    from ldm.models.text import TextTower
    from ldm.recipes.sources import load_towers

    if source in TEXTS:
        configs = list(TEXTS[source])
    else:
        try:
            configs = [tower.config for tower in load_towers(source)]
        except ValueError:
            said.append(f"task.text: {source!r} is not here; planned as Stable Diffusion 2's")
            configs = list(TEXTS["sd21"])
    with torch.device("meta"):
        towers = [TextTower(c) for c in configs]
    pooled = configs[-1].projection or configs[-1].width
    return towers, configs[0].context_length, sum(c.width for c in configs), pooled


def _json(source: str, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The config of a model by its name or folder, without the keys that say who wrote it; None if it is not here."""
    from ldm.models.shipped import SHIPPED

    folder = SHIPPED.get(source, Path(source))
    for name in names:
        if (folder / name).is_file():
            tree = json.loads((folder / name).read_text(encoding="utf-8"))
            return {k: v for k, v in tree.items() if not k.startswith("_")}
    return None


def _pixels(config: RunConfig, otherwise: int) -> int:
    """The side of the pictures."""
    from ldm.data.loader import DataConfig

    return config.data.size if isinstance(config.data, DataConfig) else otherwise


def _cached(config: RunConfig) -> bool:
    from ldm.data.loader import DataConfig

    return isinstance(config.data, DataConfig) and config.data.cached


def _data(config: RunConfig, encoded: float, cached: bool, said: list[str]) -> tuple[int | None, float]:
    """Samples and bytes of one as training reads it: `encoded` in a cache, else as stored."""
    from ldm.data.loader import DataConfig
    from ldm.data.manifest import Manifest, resolve

    if not isinstance(config.data, DataConfig):
        return None, encoded if cached else 0.0
    try:
        manifest = Manifest.read(resolve(config.data.path), config.data.remote)
    except (ValueError, OSError) as error:
        said.append(f"{error}; --samples N tells how many there will be")
        return None, encoded
    shards = manifest.split(config.data.split)
    samples = sum(s.samples for s in shards)
    if cached and manifest.cached is None:
        return samples, encoded
    return samples, sum(s.bytes for s in shards) / max(1, samples)


def _autoencoder(config: RunConfig, task: Any, world: int, gpu: bool) -> Job:
    import torch
    from torch import Tensor, nn

    from ldm.models.autoencoder import Autoencoder
    from ldm.plan.flops import count_flops
    from ldm.plan.report import Job

    class Reconstruct(nn.Module):
        """Images -> moments -> images."""

        def __init__(self) -> None:
            super().__init__()
            self.autoencoder = Autoencoder(task.model)

        def forward(self, images: Tensor) -> Tensor:
            mean, _ = self.autoencoder.encode(images).chunk(2, dim=1)
            return self.autoencoder.decode(mean)

    said = ["the discriminator and the perceptual network are not counted", "checkpointing is not counted"]
    size = _pixels(config, task.model.sample_size)

    def build(recompute: bool) -> nn.Module:
        with torch.device("meta"):
            return Reconstruct().train()

    def inputs(batch: int) -> tuple[Any, ...]:
        return (torch.empty(batch, 3, size, size, device="meta"),)

    samples, stored = _data(config, 0.0, False, said)
    return Job(
        name=config.name, build=build, inputs=inputs, flops=float(count_flops(build(False), *inputs(1))),
        batch=config.train.batch, steps=config.train.steps, layout=_layout(config, world, gpu), recompute=False,
        precision=_precision(config, gpu), samples=samples, sample_bytes=stored, warnings=tuple(said),
    )  # fmt: skip
