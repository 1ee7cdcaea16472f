"""Our U-Net against diffusers' UNet2DConditionModel: same shape, same weights, same optimizer.

In one process, in turns, in float32: forward; forward, backward and AdamW, with PyTorch's own choice of attention
kernel and with the plain one; with the share of a matrix product's rate that was measured in the same rounds, and the
peak memory of a process that only trains. torch.compile runs for the smallest shape (minutes of compilation).

As they come (`bench.programs`): each in a process of its own, as our programs and as scripts around diffusers run.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import parts
from bench.__main__ import main
from bench.timing import Options, Spread, interleaved, report
from ldm.config.load import encode
from ldm.models.presets import UNETS
from ldm.models.unet import UNet, UNetConfig
from ldm.plan.flops import count_flops

MATRIX = 1024
"""Side of the matrices whose product sets the rate."""


@dataclass(frozen=True)
class Shape:
    """A network, its latents' side and text, and batches: of a training step, of drawn pictures.

    `twice`: whether the machine has room for two processes that train it.
    """

    config: UNetConfig
    side: int
    tokens: int
    batch: int
    drawn: int
    rounds: int
    twice: bool = True


_THREE = replace(
    UNETS["emoji"], sample_size=32, block_out_channels=(64, 128, 256), layers_per_block=2, attention_head_dim=(2, 4, 8)
)
SHAPES = {
    "emoji": Shape(UNETS["emoji"], 16, 32, 32, 8, 8),
    "three levels of 64": Shape(_THREE, 32, 77, 8, 4, 5),
    "sd15": Shape(UNETS["sd15"], 32, 77, 1, 1, 2, twice=False),
}
QUICK = {"tiny": Shape(UNETS["tiny"], 8, 7, 2, 1, 2)}
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, t, text states) -> output."""


def both(config: UNetConfig) -> tuple[UNet, nn.Module]:
    """Our network, and theirs with our parameters themselves: there is memory for one set of SD's."""
    from diffusers import UNet2DConditionModel

    ours = parts.unet(config)
    nn.init.normal_(ours.conv_out.weight, std=0.02)  # starts at zero, and zeros would agree whatever came before
    with torch.device("meta"):
        theirs: Any = UNet2DConditionModel.from_config({k: v for k, v in encode(config).items() if v is not None})
    own = dict(ours.named_parameters())
    names = [name for name, _ in theirs.named_parameters()]
    if set(names) != set(own):
        raise ValueError("the two networks have not the same parameters")
    for name in names:
        where, _, last = name.rpartition(".")
        setattr(theirs.get_submodule(where), last, own[name])
    return ours, theirs


def adam(network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of both sides."""
    return torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)


def training(
    optimizer: torch.optim.Optimizer, call: Network, x: Tensor, t: Tensor, text: Tensor, *, half: bool = False
) -> Callable[[], object]:
    """A step of the mean squared error to a fixed target; `half`: under bfloat16 autocast."""
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = (call(x, t, text).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """PyTorch's attention by its formula."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def under(
    context: Callable[[], contextlib.AbstractContextManager[Any]], step: Callable[[], object]
) -> Callable[[], object]:
    """The step inside a context."""

    def inside() -> None:
        with context():
            step()

    return inside


def deviation(a: Tensor, b: Tensor) -> float:
    """Relative to the second."""
    return float((a - b).norm() / b.norm())


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and text states of a training step."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(shape.batch, shape.config.in_channels, shape.side, shape.side, generator=g)
    text = torch.randn(shape.batch, shape.tokens, parts.text_states(shape.config), generator=g)
    return x, torch.randint(0, 1000, (shape.batch,), generator=g), text


def call_of(network: nn.Module) -> Network:
    """One way to call either network."""
    if isinstance(network, UNet):
        return lambda x, t, text: network(x, t, {"text": text})
    return lambda x, t, text: network(x, t, encoder_hidden_states=text, return_dict=False)[0]


def quiet(call: Network, *given: Tensor) -> Callable[[], object]:
    """The forward pass alone."""

    @torch.no_grad()
    def forward() -> Tensor:
        return call(*given)

    return forward


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
    from bench.programs import as_they_come

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
