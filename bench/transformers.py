"""Our transformers against diffusers' SD3Transformer2DModel: same shape, same weights, same optimizer.

As they come: a process each, in turns. Ours keeps freed memory, as our programs do on CPUs; sampling is what our
pipeline does around the network: text projected once, both halves of guidance in one call, modulations of all steps at
once. Theirs is the loop of their pipeline around the network, and
training as their scripts have it. In bfloat16 both hold their weights in it for sampling, and train under autocast.

SD3.5 medium has its width, heads, kinds of blocks and text, and 3 of its 24 blocks, so that what is outside of blocks
weighs more than in the whole; pictures have 256 pixels. Where the processor has no instructions for bfloat16, theirs
emulate it at a seventh of the speed of float32: there SD3.5 is drawn in 2 steps in bfloat16, as 20 take them minutes.
"""

from __future__ import annotations

import copy
import functools
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.__main__ import main
from bench.apart import Worker, compare, serve
from bench.networks import deviation
from bench.timing import Options, machine
from ldm.allocator import keep_freed_memory
from ldm.config.load import encode
from ldm.diffusion.prediction import Velocity
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Flow
from ldm.models.transformers import presets
from ldm.models.transformers.sd3 import SD3Config, SD3Transformer
from ldm.models.transformers.times import known_times
from ldm.models.wide import emulates
from ldm.sampling import sample
from ldm.sampling.guidance import classifier_free

GUIDANCE, SHIFT, STEPS = 5.0, 3.0, 20
HALF = torch.bfloat16
FASTER = {"sampling": 1.15, "forward": 1.0, "training": 1.0}
"""How many times as fast as theirs we want to be."""
MEMORY = 0.9


@dataclass(frozen=True)
class Shape:
    """A network, its latents' side and text, and batches: of a training step, of drawn pictures; rounds and steps."""

    config: SD3Config
    side: int
    tokens: int
    batch: int
    drawn: int
    rounds: int
    steps: int = STEPS
    emulated: int = STEPS
    """Steps in bfloat16 where the processor has none."""

    @property
    def steps_of_half(self) -> int:
        """Of a picture drawn in bfloat16."""
        return self.emulated if emulates(HALF) else self.steps


_EMOJI = replace(
    presets.SD3_TINY, sample_size=16, num_layers=6, attention_head_dim=64, num_attention_heads=3,
    caption_projection_dim=192, joint_attention_dim=192, pooled_projection_dim=192, pos_embed_max_size=16,
    dual_attention_layers=(),
)  # fmt: skip
_SD35 = replace(presets.SD35_MEDIUM, num_layers=3, dual_attention_layers=(0,), pos_embed_max_size=96)
SHAPES = {
    "emoji": Shape(_EMOJI, side=16, tokens=32, batch=32, drawn=4, rounds=6),
    "sd35": Shape(_SD35, side=32, tokens=154, batch=1, drawn=1, rounds=2, emulated=2),
}
QUICK = {"tiny": Shape(presets.SD3_TINY, side=8, tokens=7, batch=2, drawn=1, rounds=2, steps=4, emulated=4)}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""x, t, text states, pooled text."""
Call = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def both(config: SD3Config) -> tuple[SD3Transformer, nn.Module]:
    """Our network, and theirs with our parameters themselves."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    ours = SD3Transformer(config).eval()
    for parameter in ours.parameters():  # fresh ones give zeros, which would agree whatever came before
        nn.init.normal_(parameter, std=0.02)
    with torch.device("meta"):
        theirs: Any = SD3Transformer2DModel.from_config({k: v for k, v in encode(config).items() if k != "kind"})
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    for name, parameter in ours.named_parameters():
        where, _, last = name.rpartition(".")
        setattr(theirs.get_submodule(where), last, parameter)
    return ours, theirs.eval()


def inputs(shape: Shape, rows: int) -> Inputs:
    """Of so many samples."""
    g, config = torch.Generator().manual_seed(4), shape.config
    x = torch.randn(rows, config.in_channels, shape.side, shape.side, generator=g)
    text = torch.randn(rows, shape.tokens, config.joint_attention_dim, generator=g)
    pooled = torch.randn(rows, config.pooled_projection_dim, generator=g)
    return x, 1000 * torch.rand(rows, generator=g), text, pooled


def call_of(network: nn.Module) -> Call:
    """One way to call either network."""
    if isinstance(network, SD3Transformer):
        return lambda x, t, text, pooled: network(x, t, {"text": text, "pooled": pooled})
    return lambda x, t, text, pooled: network(x, text, pooled, t, return_dict=False)[0]


@functools.cache
def halved(network: nn.Module) -> nn.Module:
    """A copy with weights in bfloat16."""
    return copy.deepcopy(network).to(HALF)


def our_sampling(ours: SD3Transformer, given: Inputs, steps: int, half: bool = False) -> Callable[[], Tensor]:
    """Guided Euler steps, as our pipeline runs them."""
    x, _, text, pooled = given
    process = Process(schedule=Flow(shift=SHIFT), prediction=Velocity())
    network: Any = halved(ours) if half else ours

    @torch.no_grad()
    def draw() -> Tensor:
        told = {"text": text, "pooled": pooled}
        known, empty = (network.prepared(v) for v in (told, {k: torch.zeros_like(v[:1]) for k, v in told.items()}))
        times = [1000 * sigma for sigma in sigmas(steps)]
        with known_times(network, times):
            return sample(
                "euler", classifier_free(process.denoiser(network), empty, GUIDANCE), x, known,
                schedule=process.schedule, steps=steps, times=times, noise=lambda i: torch.zeros_like(x),
            )  # fmt: skip

    return draw


@functools.cache
def sigmas(steps: int) -> list[float]:
    """Noise levels that the family's own scheduler visits, without the last, 0."""
    return _scheduler(steps).sigmas[:-1].tolist()


def _scheduler(steps: int) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps)
    return scheduler


def their_sampling(theirs: nn.Module, given: Inputs, steps: int, half: bool = False) -> Callable[[], Tensor]:
    """The loop of StableDiffusion3Pipeline around the network."""
    x, _, text, pooled = (v.to(HALF) if half else v for v in given)
    states, vectors = (torch.cat([torch.zeros_like(v), v]) for v in (text, pooled))

    network = halved(theirs) if half else theirs

    @torch.no_grad()
    def draw() -> Tensor:
        scheduler, latents = _scheduler(steps), x
        for t in scheduler.timesteps:
            doubled = torch.cat([latents] * 2)
            out = network(doubled, states, vectors, t.expand(len(doubled)), return_dict=False)[0]
            uncond, cond = out.chunk(2)
            latents = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, latents, return_dict=False)[0]
        return latents

    return draw


def forward(network: nn.Module, given: Inputs, half: bool = False) -> Callable[[], Tensor]:
    """One call without gradients; `half`: with weights in bfloat16."""
    own = isinstance(network, SD3Transformer)

    call = call_of(halved(network) if half else network)
    x, t, text, pooled = given
    if half:
        text, pooled = text.to(HALF), pooled.to(HALF)
        x = x if own else x.to(HALF)

    @torch.no_grad()
    def once() -> Tensor:
        return call(x, t, text, pooled)

    return once


def training(network: nn.Module, given: Inputs, half: bool = False) -> Callable[[], object]:
    """Forward and backward of the mean squared error to a fixed target; `half`: under bfloat16 autocast."""
    call = call_of(network)
    target = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(3))

    def step() -> None:
        with torch.autocast("cpu", HALF, enabled=half):
            loss = (call(*given).float() - target).square().mean()
        loss.backward()
        for parameter in network.parameters():
            parameter.grad = None

    return step


def alone(name: str, which: str, quick: bool) -> dict[str, Callable[[], object]]:
    """What a process that only has one of the networks is asked for."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    shape = (QUICK if quick else SHAPES)[name]
    network: Any = dict(zip(("ldm", "diffusers"), both(shape.config), strict=True))[which]
    if which == "ldm":
        keep_freed_memory()
    many, drawn = inputs(shape, shape.batch), inputs(shape, shape.drawn)
    sampling = our_sampling if which == "ldm" else their_sampling
    cases: dict[str, Callable[[], object]] = {}
    for half, of in ((False, ""), (True, " bf16")):
        cases[f"forward{of}"] = forward(network, many, half)
        cases[f"sampling{of}"] = sampling(network, drawn, shape.steps_of_half if half else shape.steps, half)
        cases[f"training{of}"] = training(network, many, half)
    return cases


def same(shape: Shape) -> dict[str, float]:
    """How far outputs and drawn latents are apart, relative. Raises ValueError where it is not rounding."""
    ours, theirs = both(shape.config)
    given = inputs(shape, 1)
    apart = {
        "outputs": deviation(forward(ours, given)(), forward(theirs, given)()),
        "drawn": deviation(our_sampling(ours, given, 3)(), their_sampling(theirs, given, 3)()),
        "outputs bf16": deviation(forward(ours, given, True)().float(), forward(theirs, given, True)().float()),
    }
    if not max(apart["outputs"], apart["drawn"]) < 1e-4 or not apart["outputs bf16"] < 0.05:
        raise ValueError(f"the two networks do not compute the same: nothing to compare ({apart})")
    return apart


def peak(name: str, which: str, half: bool, quick: bool) -> float:
    """Peak memory in MB of a training step in a process of its own, beyond its imports, weights and gradients."""
    argv = [sys.executable, "-m", "bench.transformers", "peak", name, which, str(int(half)), str(int(quick))]
    return float(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()[-1])


def one_peak(name: str, which: str, half: bool, quick: bool) -> float:
    """What `peak` starts: gradients and the libraries' own memory are there before, so that activations remain."""
    import psutil

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    shape = (QUICK if quick else SHAPES)[name]
    ours, theirs = both(shape.config)
    network: Any = ours if which == "ldm" else theirs
    del ours, theirs
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    call = call_of(network)

    def step(shape: Shape, rows: int) -> None:
        given = inputs(shape, rows)
        with torch.autocast("cpu", HALF, enabled=half):
            loss = call(*given).float().square().mean()
        loss.backward()

    step(replace(shape, side=shape.side // 4, tokens=4), 1)
    before = psutil.Process().memory_info().rss / 2**20
    step(shape, shape.batch)
    step(shape, shape.batch)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


@dataclass(frozen=True)
class Row:
    """A row of the table: seconds or MB of both."""

    what: str
    ours: float
    theirs: float
    ratio: float
    """How many times as fast ours is; for memory ours over theirs."""
    wanted: float
    unit: str

    def line(self) -> str:
        """As it is printed."""
        memory = self.unit == "MB"
        met = self.ratio <= self.wanted if memory else self.ratio >= self.wanted
        wanted = f"{'at most' if memory else 'at least'} {self.wanted:.2f}"
        numbers = f"{self.ours:>10.3f} {self.theirs:>10.3f} {self.unit:<2}  {self.ratio:>6.2f}"
        return f"  {self.what:<44} {numbers}   {wanted}: {'yes' if met else 'NO'}"


def times(name: str, shape: Shape, options: Options) -> tuple[dict[str, Any], list[Row]]:
    """Every case of both as programs, a process each, in turns; training last, as it leaves memory behind."""
    argv = ["-m", "bench.transformers", "alone", name]
    result: dict[str, Any] = {}
    rows: list[Row] = []
    quick = str(int(options.quick))
    with Worker([*argv, "ldm", quick]) as ours, Worker([*argv, "diffusers", quick]) as theirs:
        for case in ("forward", "sampling", "forward bf16", "sampling bf16", "training", "training bf16"):
            long = case.startswith("sampling") or (case.endswith("bf16") and emulates(HALF))
            rounds = options.times(min(shape.rounds, 3) if long else shape.rounds)
            found = compare(name, ours, theirs, case, rounds, warmup=0 if name == "sd35" and long else 1)
            kind, steps = case.split()[0], shape.steps_of_half if "bf16" in case else shape.steps
            of = {"sampling": f"{steps} guided steps, batch {shape.drawn}"}.get(kind, f"{kind}, batch {shape.batch}")
            seconds = {k: v["median"] for k, v in found["processor"].items()}
            speed = 1 / found["ratios"]["processor, ldm / diffusers"]["median"]
            what = f"{name}, {of}, {'bfloat16' if 'bf16' in case else 'float32'}"
            rows.append(Row(what, seconds["ldm"], seconds["diffusers"], speed, FASTER[kind], "s"))
            result[case] = found
    return result, rows


def memory(name: str, options: Options) -> tuple[dict[str, Any], list[Row]]:
    """Peaks of a training step."""
    result, rows = {}, []
    measure = one_peak if options.quick else peak  # a figure only in a process of its own
    for half, of in ((False, "float32"), (True, "bfloat16")):
        mb = {which: measure(name, which, half, options.quick) for which in ("ldm", "diffusers")}
        part = mb["ldm"] / max(mb["diffusers"], 1e-9)
        rows.append(Row(f"{name}, memory of a training step, {of}", mb["ldm"], mb["diffusers"], part, MEMORY, "MB"))
        result[of] = {**mb, "ratio": part}
    return result, rows


def run(options: Options) -> dict[str, Any]:
    """Measure on the CPU; about ten minutes."""
    result: dict[str, Any] = {}
    rows: list[Row] = []
    for name, shape in (QUICK if options.quick else SHAPES).items():
        apart = same(shape)
        found, more = times(name, shape, options)
        peaks, most = memory(name, options)
        rows += more + most
        result[name] = {**found, "peak_mb": peaks, "apart": apart}
    if options.quick:
        result |= {k: result["tiny"][k] for k in ("forward", "sampling", "training")}
    own = "its own" if not emulates(HALF) else "emulated (AVX2 alone)"
    told = machine(options.threads, [])
    where = f"{options.threads} of {told['cores_of_machine']} cores, torch {told['torch']}, bfloat16 {own}"
    print(f"\n{told['cpu']}, {where}")
    print(f"  {'processor seconds (medians)':<44} {'ldm':>10} {'diffusers':>10}      ratio   wanted")
    for row in rows:
        print(row.line())
    return result | {"bfloat16": own, "table": [vars(row) for row in rows]}


if __name__ == "__main__":
    if sys.argv[1:2] == ["alone"]:
        serve(alone(sys.argv[2], sys.argv[3], sys.argv[4] == "1"))
    elif sys.argv[1:2] == ["peak"]:
        print(one_peak(sys.argv[2], sys.argv[3], sys.argv[4] == "1", sys.argv[5] == "1"))
    else:
        sys.exit(main(["transformers", *sys.argv[1:]]))
