"""`ldm plan CONFIG`: memory, time and cost of a run before it is queued, counted without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import plan_parts as parts
from ldm.cli.options import Parser

if TYPE_CHECKING:
    from ldm.config.schema import RunConfig
    from ldm.plan.report import Job


def parser() -> Parser:
    """Options of the verb."""
    p = Parser(
        prog="ldm plan",
        description="Memory, throughput, time and cost of a run, and what would go wrong, without a GPU.",
    )
    p.add_argument("config", help="a YAML file, such as configs/train/text_to_image_emoji.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.batch=2048")
    p.add_argument("--nodes", type=int, default=1)
    p.add_argument("--gpus-per-node", type=int, default=8)
    p.add_argument("--gpu", default="a100-80g", help="a100-80g, a100-40g, h100, h200, v100-32g, l40s, ...")
    p.add_argument("--price", type=float, help="of one GPU for an hour, in any currency")
    p.add_argument("--inside", type=float, metavar="GB/s", help="link of a GPU within its node, one way")
    p.add_argument("--outside", type=float, metavar="GB/s", help="network of a node, one way, all ports together")
    p.add_argument("--samples", type=int, help="of the data, where it is not here")
    p.add_argument("--json", action="store_true", help="as JSON")
    p.add_argument("--page", type=Path, metavar="OUT.html", help="also write a page with figures")
    return p


def main(argv: list[str]) -> int:
    """Run the verb; ValueError for users' mistakes."""
    args = parser().parse_words(argv)
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
    from ldm.cli.plan_losses import clip, distill, finetune
    from ldm.recipes.autoencoder import AutoencoderTask
    from ldm.recipes.clip import ClipTask
    from ldm.recipes.distill import DistillTask
    from ldm.recipes.finetune import FinetuneTask
    from ldm.recipes.text_to_image import TextToImageTask

    task = config.task
    if isinstance(task, TextToImageTask):
        return _text_to_image(config, task, world, gpu)
    if isinstance(task, AutoencoderTask):
        return _autoencoder(config, task, world, gpu)
    if isinstance(task, ClipTask):
        return clip(config, task, world, gpu)
    if isinstance(task, FinetuneTask):
        return finetune(config, task, world, gpu)
    if isinstance(task, DistillTask):
        return distill(config, task, world, gpu)
    known = "autoencoder, clip, distill, finetune, text_to_image"
    raise ValueError(f"task.kind: {task.kind!r} cannot be planned (its steps are those of finetune); {known} can")


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
    pixels = parts.pixels(config, (unet.sample_size or 64) * factor)
    side = pixels // factor
    cached = task.cache is not None or parts.cached(config)
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

    frozen = parts.frozen(vae, towers, pixels, context, cached)
    samples, size = parts.data(config, 2.0 * (2 * channels * side * side + context * width + pooled), cached, said)
    return Job(
        name=config.name,
        build=build,
        inputs=inputs,
        flops=float(count_flops(build(False), *inputs(1))),
        batch=config.train.batch,
        steps=config.train.steps,
        layout=parts.layout(config, world, gpu),
        recompute=chosen != "none",
        precision=parts.precision(config, gpu),
        frozen=tuple(frozen),
        samples=samples,
        sample_bytes=size,
        warnings=tuple(said),
    )


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
    size = parts.pixels(config, task.model.sample_size)

    def build(recompute: bool) -> nn.Module:
        with torch.device("meta"):
            return Reconstruct().train()

    def inputs(batch: int) -> tuple[Any, ...]:
        return (torch.empty(batch, 3, size, size, device="meta"),)

    samples, stored = parts.data(config, 0.0, False, said)
    return Job(
        name=config.name, build=build, inputs=inputs, flops=float(count_flops(build(False), *inputs(1))),
        batch=config.train.batch, steps=config.train.steps, layout=parts.layout(config, world, gpu), recompute=False,
        precision=parts.precision(config, gpu), samples=samples, sample_bytes=stored, warnings=tuple(said),
    )  # fmt: skip
