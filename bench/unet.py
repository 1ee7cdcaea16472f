"""Our U-Net against diffusers' UNet2DConditionModel: same shape, same weights, same optimizer.

In one process, in turns, in float32: forward; forward, backward and AdamW, with PyTorch's own choice of attention
kernel and with the plain one; with the share of a matrix product's rate that was measured in the same rounds, and the
peak memory of a process that only trains. torch.compile runs for the smallest shape (minutes of compilation).

As they come (`bench.programs`): each in a process of its own, as our programs and as scripts around diffusers run.
"""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.__main__ import main
from bench.networks import (
    QUICK,
    SHAPES,
    Network,
    Shape,
    adam,
    both,
    call_of,
    deviation,
    inputs,
    plain,
    quiet,
    training,
    under,
)
from bench.programs import as_they_come
from bench.timing import Options, Spread, interleaved, report
from ldm.models.unet import UNet
from ldm.plan.flops import count_flops

MATRIX = 1024
"""Side of the matrices whose product sets the rate."""


def peak(shape: str, which: str, quick: bool) -> float:
    """Peak memory in MB of two training steps in a process of its own, beyond what its imports and weights took."""
    argv = [sys.executable, "-m", "bench.unet", shape, which, str(int(quick))]
    return float(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()[-1])


def one_peak(name: str, which: str, quick: bool) -> float:
    """What `peak` starts; the optimizer's state and the gradients are there before, so that activations remain."""
    torch.set_num_threads(1)
    shape = (QUICK if quick else SHAPES)[name]
    network = dict(zip(("ldm", "diffusers"), both(shape.config), strict=True))[which]
    x, t, text = inputs(shape)
    optimizer = adam(network)
    training(optimizer, call_of(network), x[:1], t[:1], text[:1])()
    before = _rss()
    step = training(optimizer, call_of(network), x, t, text)
    step()
    step()
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before, 0.0)


def _rss() -> float:
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def kept(call: Network, *given: Tensor) -> float:
    """MB that a forward pass keeps for its backward pass, each storage once: the network's own part of the peak."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call(*given)
    del out
    return sum(storages.values()) / 2**20


def matrix() -> tuple[Callable[[], object], float]:
    """A matrix product and its operations."""
    a = torch.randn(MATRIX, MATRIX)
    return lambda: a @ a, 2.0 * MATRIX**3


def share(seconds: dict[str, list[float]], name: str, flops: float, matrix_flops: float) -> Spread:
    """The rate of a case over the matrix product's of the same round."""
    rounds = zip(seconds[name], seconds["matrix product"], strict=True)
    return Spread.of([(flops / a) / (matrix_flops / b) for a, b in rounds])


def one_shape(name: str, shape: Shape, options: Options) -> dict[str, Any]:
    """What is measured of one shape in this process."""
    ours, theirs = both(shape.config)
    x, t, text = inputs(shape)
    calls = {"ldm": call_of(ours), "diffusers": call_of(theirs)}
    with torch.no_grad():
        apart = deviation(*(call(x, t, text) for call in calls.values()))
    print(f"== {name}: outputs differ by {apart:.1e} (relative)")
    if not apart < 1e-3:
        raise ValueError("the two networks do not compute the same: nothing to compare")
    rounds = options.times(shape.rounds)
    product, matrix_flops = matrix()
    cases = {f"{k} forward": quiet(call, x, t, text) for k, call in calls.items()} | {"matrix product": product}
    seconds = interleaved(cases, rounds, warmup=1)
    result = {"forward": report(f"forward, batch {shape.batch}", seconds, [("ldm forward", "diffusers forward")])}
    flops = forward_flops(shape)
    for k in calls:
        s = share(seconds, f"{k} forward", flops, matrix_flops)
        print(f"  {k} forward: {s.median:.2f} of the matrix product's rate ({s.low:.2f} .. {s.high:.2f})")
        result["forward"][f"{k} share of the matrix rate"] = s.record()
    result["training"] = train_both({"ldm": ours, "diffusers": theirs}, (x, t, text), rounds, flops)
    result["kept_mb"] = {k: kept(call, x, t, text) for k, call in calls.items()}
    print(f"  kept for the backward pass: {result['kept_mb']} MB")
    return result | {"outputs_apart": apart, "gflop_forward": flops / 1e9}


def forward_flops(shape: Shape) -> float:
    """Operations of the network as it is defined: what either side leaves out by better algebra still counts."""
    with torch.device("meta"):
        network = UNet(shape.config)
        x, t, text = (v.to("meta") for v in inputs(shape))
    return float(count_flops(network, x, t, {"text": text}))


def train_both(networks: dict[str, nn.Module], given: tuple[Tensor, ...], rounds: int, flops: float) -> dict[str, Any]:
    """Steps of both, with either attention kernel."""
    optimizer = adam(networks["ldm"])  # the parameters are the same
    steps = {k: training(optimizer, call_of(network), *given) for k, network in networks.items()}
    product, matrix_flops = matrix()
    cases = steps | {f"{k}, plain attention": under(plain, step) for k, step in steps.items()}
    seconds = interleaved(cases | {"matrix product": product}, rounds, warmup=1)
    pairs = [
        ("ldm", "diffusers"),
        ("ldm, plain attention", "diffusers, plain attention"),
        ("ldm, plain attention", "ldm"),
    ]
    result = report(f"forward, backward, AdamW, batch {len(given[0])}, float32", seconds, pairs)
    for k in networks:
        s = share(seconds, k, 3 * flops, matrix_flops)
        print(f"  {k} training: {s.median:.2f} of the matrix product's rate ({s.low:.2f} .. {s.high:.2f})")
        result[f"{k} share of the matrix rate"] = s.record()
    return result


def compiled(shape: Shape, options: Options) -> dict[str, Any]:
    """torch.compile of both: forward and training steps."""
    ours, theirs = both(shape.config)
    given = inputs(shape)
    cases: dict[str, Callable[[], object]] = {}
    for name, network in (("ldm", ours), ("diffusers", theirs)):
        call: Network = torch.compile(call_of(network), fullgraph=name == "ldm")
        cases[f"{name} compiled forward"] = quiet(call, *given)
        cases[f"{name} compiled step"] = training(adam(network), call, *given)
    pairs = [(f"ldm compiled {k}", f"diffusers compiled {k}") for k in ("forward", "step")]
    return report("compiled", interleaved(cases, options.times(shape.rounds), warmup=2), pairs)


def run(options: Options) -> dict[str, Any]:
    """Measure on the CPU: every shape, the memory of training, and the compiled smallest one; about half an hour."""

    shapes = QUICK if options.quick else SHAPES
    result: dict[str, Any] = {}
    for name, shape in shapes.items():
        apart = as_they_come(name, shape, options)  # first: what this process holds afterwards it may keep
        result[name] = one_shape(name, shape, options) | {"as they come": apart}
        gc.collect()
    smallest = next(iter(shapes))
    result |= {k: result[smallest][k] for k in ("training", "forward", "as they come")}
    measure = one_peak if options.quick else peak  # a figure only in a process of its own
    result["peak_mb"] = {n: {k: measure(n, k, options.quick) for k in ("ldm", "diffusers")} for n in shapes}
    for name, found in result["peak_mb"].items():
        part = found["ldm"] / max(found["diffusers"], 1e-9)
        print(f"peak memory of a step beyond weights, gradients and moments, {name}: {found} MB, ratio {part:.2f}")
    if not options.quick:
        result["compiled"] = compiled(shapes[smallest], options)
    return result


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[2] in ("ldm", "diffusers"):
        print(one_peak(sys.argv[1], sys.argv[2], sys.argv[3] == "1"))
    else:
        sys.exit(main(["unet", *sys.argv[1:]]))
