"""`ldm plan CONFIG`: memory, time and cost of a run before it is queued, counted without a GPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import plan_parts as parts
from ldm.cli.options import Parser
from ldm.cli.plan_parts import HOW_MANY

if TYPE_CHECKING:
    from ldm.config.schema import RunConfig
    from ldm.plan.report import Job

MOST = 10**12
"""Of anything that is counted."""


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
    _check(args)

    from ldm.config.schema import load_run
    from ldm.plan.hardware import find
    from ldm.plan.report import Planner, text
    from ldm.plan.throughput import Cluster

    hardware = find(args.gpu)
    links = {k: v for k, v in (("inside", args.inside), ("outside", args.outside)) if v is not None}
    cluster = Cluster(nodes=args.nodes, per_node=args.gpus_per_node, hardware=replace(hardware, **links))
    config = load_run(args.config, args.overrides)
    with _in_words(args.config):
        job = job_of(config, cluster.world, gpu=not hardware.host)
        if args.samples is not None:
            known = tuple(w for w in job.warnings if HOW_MANY not in w)
            job = replace(job, samples=args.samples, warnings=known)
        plan = Planner(job, cluster, args.price).plan()
        told = json.dumps(plan.record(), indent=1, allow_nan=False) if args.json else text(plan)
    print(told)
    if args.page is not None:
        from ldm.web.plan import page

        args.page.parent.mkdir(parents=True, exist_ok=True)
        page(plan).write(args.page)
        if not args.json:
            print(f"\n{args.page}: the same with figures")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers that nothing can be planned with, by the option's name, before anything is counted."""
    for name in ("nodes", "gpus_per_node", "samples"):
        value, option = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and not 1 <= value <= MOST:
            raise ValueError(f"{option} must be at {'least 1' if value < 1 else f'most {MOST:,}'}, got {value}")
    for name in ("inside", "outside", "price"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and (value > 0 or (name == "price" and value == 0))):
            raise ValueError(f"--{name} must be {'at least' if name == 'price' else 'above'} 0, got {value:g}")
    if args.page is not None and args.page.is_dir():
        raise ValueError(f"--page: {str(args.page)!r} is a folder; expected a file's name, such as plan.html")


@contextlib.contextmanager
def _in_words(config: str) -> Iterator[None]:
    """What a network says of inputs that it cannot take, and numbers beyond a float, in one line."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Out of range float"):
            raise
        raise ValueError(f"{config}: cannot be planned: a figure is not finite") from error
    except OverflowError as error:
        raise ValueError(f"{config}: cannot be planned: a number is too large ({error})") from error
    except (RuntimeError, AssertionError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{config}: cannot be planned: its network does not run on its own inputs: {said}") from error


def job_of(config: RunConfig, world: int, *, gpu: bool) -> Job:
    """What the planner needs of a config. Raises ValueError, naming keys and values, for parts that do not fit."""
    from ldm.cli.plan_losses import clip, distill, finetune
    from ldm.recipes.autoencoder import AutoencoderTask
    from ldm.recipes.clip import ClipTask
    from ldm.recipes.distill import DistillTask
    from ldm.recipes.text_to_image import TextToImageTask

    task = config.task
    if isinstance(task, TextToImageTask):
        return _text_to_image(config, task, world, gpu)
    if isinstance(task, AutoencoderTask):
        return _autoencoder(config, task, world, gpu)
    if isinstance(task, ClipTask):
        return clip(config, task, world, gpu)
    if isinstance(task, DistillTask):
        return distill(config, task, world, gpu)
    return finetune(config, task, world, gpu)


def _text_to_image(config: RunConfig, task: Any, world: int, gpu: bool) -> Job:
    import torch

    from ldm.cli import plan_models as models
    from ldm.models import fit
    from ldm.models.network import granularity
    from ldm.models.unet import UNet
    from ldm.plan.flops import count_flops
    from ldm.plan.report import Job

    said: list[str] = []
    unet = models.network(task.network, task.start, said)
    vae, settings = models.vae(task.vae, unet, said)
    towers, channels = models.towers(task.text, unet, said), settings.latent_channels
    configs = tuple(tower.config for tower in towers)
    context, width, pooled = configs[0].context_length, fit.width(configs), fit.pooled_width(configs)
    fit.check_fit(
        unet, configs, channels, network_key="task.network" if task.start is None else "task.start's U-Net",
        text_key=f"task.text {task.text!r}", vae_key=f"task.vae {task.vae!r}",
    )  # fmt: skip
    chosen = granularity(task.gradient_checkpointing)
    how = "block" if chosen == "none" else chosen  # what a plan that recomputes would have
    pixels = parts.pixels(config, (unet.sample_size or 64) * vae.factor)
    side = models.check_size(pixels, vae.factor, "data.size")
    cached = task.cache is not None or parts.cached(config)
    if task.cache is not None and not (Path(task.cache) / "manifest.json").is_file():
        said.append(f"task.cache: nothing in {str(task.cache)!r} yet: the run encodes everything first, once")
    if not cached:
        said.append("no cache: VAE and text tower run for every image of every step; set task.cache to encode once")

    def build(recompute: bool) -> torch.nn.Module:
        with torch.device("meta"):
            module = UNet(unet).train()
        module.enable_gradient_checkpointing(how if recompute else "none")
        return module

    def inputs(batch: int) -> tuple[Any, ...]:
        cond = {"text": torch.empty(batch, context, unet.per_level("cross_attention_dim")[0], device="meta")}
        if unet.addition_embed_type:
            cond["pooled"] = torch.empty(batch, pooled, device="meta")
            cond["time_ids"] = torch.empty(batch, 6, device="meta")
        x = torch.empty(batch, unet.in_channels, side, side, device="meta")
        return x, torch.empty(batch, device="meta"), cond

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


def _autoencoder(config: RunConfig, task: Any, world: int, gpu: bool) -> Job:
    import torch
    from torch import Tensor, nn

    from ldm.cli.plan_models import check_size
    from ldm.models.vae.autoencoder import Autoencoder
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
    check_size(size, 2 ** (len(task.model.block_out_channels) - 1), "data.size")

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
