"""A training step of the framework against a bare PyTorch loop: same network, batch, loss, optimizer and threads.

The cases add up: "bare" is what one would write by hand, "objective" puts our loss into that loop (its noise belongs to
global sample positions), "engine" adds DeepSpeed, "trainer" is the whole loop of `ldm train`, "trainer with EMA" what
runs by default.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import parts
from bench.timing import Options, interleaved, ratio, report
from ldm.models.presets import AUTOENCODERS
from ldm.models.unet import UNetConfig
from ldm.models.vae.autoencoder import Autoencoder
from ldm.models.vae.latents import LatentCodec
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.rng import Rng
from ldm.train.ema import EmaConfig
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig
from ldm.train.log import Log, LogConfig
from ldm.train.optim import Optim
from ldm.train.trainer import TrainConfig, Trainer

CLIP, DROP, GAMMA = 1.0, 0.1, 5.0
OPTIM = Optim(lr=1e-4, weight_decay=0.01)


def tables() -> tuple[Tensor, Tensor, Tensor]:
    """alpha, sigma and the loss weight of every time, written out: zero terminal SNR, v, min-SNR (all (T,) float32)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha, sigma = root, (1 - root**2).sqrt()
    snr = (alpha / sigma) ** 2
    return alpha.float(), sigma.float(), (snr.clamp(max=GAMMA) / (snr + 1)).float()


def bare_loss(out: Tensor, x0: Tensor, noise: Tensor, t: Tensor, of_time: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The same loss by hand."""
    alpha, sigma, weight = (v[t] for v in of_time)
    target = alpha.view(-1, 1, 1, 1) * noise - sigma.view(-1, 1, 1, 1) * x0
    return ((out.float() - target).square().mean((1, 2, 3)) * weight).mean()


def compute(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Precision and attention kernel as the engine has them, for the peers too."""
    stack = ExitStack()
    stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16))
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    return stack


def bare(config: UNetConfig, size: int, dtype: torch.dtype, scale: float) -> Callable[[], object]:
    """One step as one would write it by hand."""
    net, of_time = parts.unet(config), tables()
    optimizer = OPTIM.build(net.parameters())
    batches = parts.batches(config, size)
    empty = parts.encode_text(config, [""])["text"]
    weights = list(net.parameters())

    def step() -> float:
        batch = next(batches)
        mean, logvar = batch["moments"].chunk(2, dim=1)
        x0 = (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)) * scale
        text = torch.where((torch.rand(size) < DROP).view(-1, 1, 1), empty, batch["text"])
        t = torch.randint(0, 1000, (size,))
        noise = torch.randn_like(x0)
        alpha, sigma = (v[t].view(-1, 1, 1, 1) for v in of_time[:2])
        with compute(dtype):
            loss = bare_loss(net(alpha * x0 + sigma * noise, t, {"text": text}), x0, noise, t, of_time)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def objective_of(config: UNetConfig) -> DenoiseObjective:
    """Our loss around the network."""
    codec = LatentCodec.of(Autoencoder(AUTOENCODERS["tiny"]))
    options = DenoiseOptions(drop=DROP)
    return DenoiseObjective(parts.unet(config), parts.process(), codec, lambda t: parts.encode_text(config, t), options)


def with_objective(config: UNetConfig, size: int, dtype: torch.dtype) -> Callable[[], object]:
    """The bare loop with our loss."""
    objective = objective_of(config)
    optimizer = OPTIM.build(objective.parameters())
    batches = parts.batches(config, size)
    weights = list(objective.parameters())

    def step() -> float:
        batch = next(batches)
        with compute(dtype):
            loss, _ = objective(batch, Rng.of(0, batch["position"]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def with_engine(config: UNetConfig, size: int, precision: Any) -> Callable[[], object]:
    """DeepSpeed in place of the loop's last four lines."""
    objective = objective_of(config)
    settings = EngineConfig(precision=precision, clip=CLIP)
    engine = Engine(objective, OPTIM.build(objective.parameters()), settings, micro_batch=size, accumulate=1)
    batches = parts.batches(config, size)

    def step() -> float:
        batch = next(batches)
        loss, _ = engine.forward(batch, Rng.of(0, batch["position"]))
        engine.backward_step(loss)
        return loss.item()

    return step


def with_trainer(config: UNetConfig, size: int, precision: Any, out: Path, ema: bool) -> Callable[[], object]:
    """The loop of `ldm train`, with its log."""
    train = TrainConfig(
        steps=10**9,
        batch=size,
        optim=OPTIM,
        engine=EngineConfig(precision=precision, clip=CLIP),
        ema=EmaConfig() if ema else None,
        log=LogConfig(every=50, tensorboard=False),
    )
    loader = cast("Any", None)  # the batches come from here
    trainer = Trainer(train, objective_of(config), loader, out, seed=0, settings={})
    log = Log(train.log, out / "log", start=0, steps=train.steps, settings={})
    batches: Any = parts.batches(config, size)
    return lambda: trainer._one_step(batches, log)


def parts_of_a_step(config: UNetConfig, out: Path, stack: ExitStack) -> dict[str, Callable[[], object]]:
    """The update of the averages, and a row of the log with everything that is gathered for it, alone."""
    train = TrainConfig(steps=10**9, batch=1, optim=OPTIM, log=LogConfig())
    trainer = Trainer(train, objective_of(config), cast("Any", None), out, seed=0, settings={})
    log = Log(train.log, out / "log", start=0, steps=train.steps, settings={})
    stack.callback(log.close)
    assert trainer.ema is not None
    ema, sums = trainer.ema, {name: torch.ones(()) for name in ("loss", *"abc")}
    return {
        "EMA": lambda: ema.update(trainer.engine.masters, 1000),
        "log row": lambda: trainer._write_metrics(log, sums, {"lr": 1.0, "grad_norm": 1.0}),
    }


def loss_difference(config: UNetConfig, size: int) -> float:
    """How far the loss by hand is from ours for the same draw, relative."""
    process, g = parts.process(), torch.Generator().manual_seed(2)
    side = config.sample_size or 16
    out, x0, noise = (torch.randn(size, config.in_channels, side, side, generator=g) for _ in range(3))
    t = torch.randint(0, 1000, (size,), generator=g)
    own = process.loss(out, x0, noise, t).mean()
    return float((bare_loss(out, x0, noise, t, tables()) - own).abs() / own)


def run(options: Options) -> dict[str, Any]:
    """Measure; the peers run on the CPU."""
    config, size = parts.unet_config(options.quick), 2 if options.quick else 64
    precision = options.precision
    dtype = EngineConfig(precision=cast("Any", precision)).dtype()
    difference = loss_difference(config, size)
    if difference > 1e-5:
        raise ValueError(f"the peer's loss is another one: {difference:.1e} apart")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        cases = {
            "bare": bare(config, size, dtype, 1.0),
            "objective": with_objective(config, size, dtype),
            "engine": with_engine(config, size, precision),
            "trainer": with_trainer(config, size, precision, Path(folder) / "a", ema=False),
            "trainer with EMA": with_trainer(config, size, precision, Path(folder) / "b", ema=True),
        }
        cases |= parts_of_a_step(config, Path(folder) / "c", stack)
        seconds = interleaved(cases, options.times(12), warmup=1 if options.quick else 2)
    title = f"training step, batch {size}, {str(dtype).removeprefix('torch.')}, {options.threads} threads"
    pairs = [
        ("objective", "bare"), ("engine", "objective"), ("trainer", "engine"), ("trainer", "bare"),
        ("trainer with EMA", "trainer"), ("EMA", "trainer"), ("log row", "trainer"),
    ]  # fmt: skip
    result = report(title, seconds, pairs)
    overhead = (ratio(seconds, "trainer", "bare").median - 1) * 100
    deepspeed = (ratio(seconds, "engine", "bare").median - ratio(seconds, "objective", "bare").median) * 100
    print(f"  overhead of the framework {overhead:+.1f} % of a bare step, of which DeepSpeed {deepspeed:+.1f} %")
    ema, row = (ratio(seconds, name, "trainer").median * 100 for name in ("EMA", "log row"))
    every = LogConfig().every
    print(f"  EMA {ema:.2f} % of a step; log {row / every:.3f} % (a row every {every} steps, TensorBoard included)")
    result |= {"ema_percent": ema, "log_percent": row / every}
    result |= {"overhead_percent": overhead, "deepspeed_percent": deepspeed, "loss_difference": difference}
    return result | {"batch": size, "dtype": str(dtype), "parameters": _count(parts.unet(config))}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
