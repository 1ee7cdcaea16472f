"""Cold starts of torch.compile: the whole network against its equal blocks once, at Stable Diffusion 1.5's shape.

Each in a process of its own with an empty cache and compilers that run in turn, in processor seconds of the process and
of the compilers that it started: the first call less what a later one takes; and of it what the compilers take to
start, as a function of one line shows. Answers and gradients are compared with those of the network as it is.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.__main__ import main
from bench.timing import Options

WAYS = ("whole", "blocks")
SIDE, TOKENS = 64, 77


def processor() -> float:
    """Processor seconds of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def one(way: str, what: str, narrow: bool) -> dict[str, Any]:
    """Compile one way and call: "draw" is a guided step's forward, "train" a forward and backward."""
    import torch
    from torch import nn

    from ldm.models.compiling import by_block
    from ldm.models.presets import UNETS
    from ldm.models.unet import UNet

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config, side = UNETS["sd15"], SIDE
    if narrow:  # as many layers and blocks, a tenth of the width
        config, side = replace(config, block_out_channels=(32, 64, 128, 128), cross_attention_dim=64), 16
    network = UNet(config).train(what == "train")
    for p in network.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    text = torch.randn(2, TOKENS, config.per_level("cross_attention_dim")[0])
    x, t = torch.randn(2, 4, side, side), torch.tensor([500.0, 500.0])
    call: Callable[..., Any] = network

    def step() -> list[torch.Tensor]:
        with torch.set_grad_enabled(what == "train"):
            out = call(x, t, {"text": text})
            if what == "draw":
                return [out]
            loss = out.square().mean()
            last = network.conv_in.weight
            found = torch.autograd.grad(loss, [last, network.conv_out.weight])
            return [loss.detach(), *found]

    plain = step()
    began, used = time.perf_counter(), processor()
    with torch.set_grad_enabled(what == "train"):  # what the compilers themselves take to start, the same for both ways
        torch.compile(lambda v: v * 2 + 1)(torch.ones(8, requires_grad=what == "train"))
    start = processor() - used
    if way == "whole":
        call = torch.compile(network, fullgraph=True)
    else:
        by_block(network)
    made = step()
    first = processor() - used
    wall = time.perf_counter() - began
    used = processor()
    step()
    later = processor() - used
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(made, plain, strict=True))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"cold": first - later, "start": start, "later": later, "wall": wall, "apart": apart, "graphs": graphs}


def ask(way: str, what: str, narrow: bool) -> dict[str, Any]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        argv = [sys.executable, "-m", "bench.compiling", way, what, str(int(narrow))]
        done = subprocess.run(argv, check=True, capture_output=True, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def run(options: Options) -> dict[str, Any]:
    """Measure both ways of drawing and of training; `quick` a narrow network's drawing alone."""
    result: dict[str, Any] = {}
    for what in ("draw",) if options.quick else ("draw", "train"):
        found = {way: ask(way, what, options.quick) for way in WAYS}
        part = found["blocks"]["cold"] / max(found["whole"]["cold"], 1e-9)
        own = {way: row["cold"] - row["start"] for way, row in found.items()}
        alone = own["blocks"] / max(own["whole"], 1e-9)
        print(f"{what}: cold start in processor seconds, of it the compilers' own; graphs; difference; a later call")
        for way, row in found.items():
            seconds = f"{row['cold']:8.1f} {row['start']:8.1f}"
            print(f"  {way:<8} {seconds}   {row['graphs']:3d}   {row['apart']:.1e}   {row['later']:8.2f}")
        print(f"  blocks / whole: {part:.3f}; without the compilers' own start {alone:.3f}")
        result[what] = found | {"ratio": part, "ratio_of_networks": alone}
    return result


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in WAYS:
        print(json.dumps(one(sys.argv[1], sys.argv[2], sys.argv[3] == "1")))
    else:
        sys.exit(main(["compiling", *sys.argv[1:]]))
