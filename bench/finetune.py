"""A LoRA step and a DreamBooth step against diffusers + PEFT: the shipped model, the same batch, loss and optimizer.

"diffusers script" encodes pictures and captions at every step, as its training scripts do; "diffusers cached" is given
latents and text states, as ours is after its cache is made. Peak memory is of a process that runs nothing else, above
what it held before its first step (of a small model most is what the libraries make for each shape, and gaps in the
heap), and that of its tensors alone, as torch's profiler counts them; the same process counts how often steps call a
text tower. `python -m bench.finetune --shape sd15 ...` measures a network of SD 1.5's size with random weights and
latents of 32 x 32. Also how far the weights with the exported file merged into them are from the LoRA that trained.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import Options, interleaved, ratio, report
from ldm.adapters.full import FullAdapter, FullConfig
from ldm.adapters.lora import LoraAdapter, LoraConfig
from ldm.checkpoint import lora_files
from ldm.models.presets import UNETS
from ldm.models.shipped import locate
from ldm.models.unet import UNet
from ldm.objectives.denoise import DenoiseObjective, DenoiseOptions
from ldm.pipeline import TextToImage
from ldm.recipes.sources import text_encoder
from ldm.rng import Rng
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig
from ldm.train.optim import Optim

RANK, SIDE = 4, 64
OPTIM = Optim(lr=1e-4, weight_decay=0.01)
KINDS = ("lora", "dreambooth")
CAPTIONS = ("a sks dog", "a dog")
TOWERS = ("TextTower", "CLIPTextModel")
ALONE = 3
"""Steps of a process that runs nothing else."""
Step = Callable[[], object]


def pictures(batch: int) -> tuple[Tensor, list[str], Tensor]:
    """Pictures (B, 3, 64, 64), captions, and weights of the loss: the first half the subject's, then the class's."""
    images = torch.rand(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    half = batch // 2
    return images, [CAPTIONS[0]] * (batch - half) + [CAPTIONS[1]] * half, torch.ones(batch)


def ours(kind: str, batch: int, precision: str, shape: str = "emoji") -> Step:
    """The engine's step on cached moments and text."""
    pipeline = TextToImage.load("emoji")
    images, captions, weight = pictures(batch)
    encode, moments = text_encoder(pipeline.text), pipeline.codec.moments(images).detach()
    if shape == "sd15":
        pipeline.network, moments = UNet(UNETS["sd15"]), torch.randn(batch, 8, 32, 32)
        encode = lambda texts: {"text": torch.randn(len(texts), 77, 768)}  # noqa: E731
    fixed = {"moments": moments, **encode(captions), "weight": weight, "key": captions}
    adapter = LoraAdapter(LoraConfig(rank=RANK)) if kind == "lora" else FullAdapter(FullConfig())
    trained = adapter.attach(pipeline.network, pipeline.text)
    objective = DenoiseObjective(trained, pipeline.process, pipeline.codec, encode, DenoiseOptions(drop=0.0))
    config = EngineConfig(zero_stage=1, precision=cast("Any", precision))
    engine = Engine(objective, OPTIM.build(objective.parameters()), config, micro_batch=batch, accumulate=1)
    done = 0

    def step() -> float:
        nonlocal done
        positions = list(range(done, done + batch))
        done += batch
        loss, _ = engine.forward(fixed | {"position": torch.tensor(positions)}, Rng.of(0, positions))
        engine.backward_step(loss)
        return loss.item()

    return step


def theirs(kind: str, batch: int, precision: str, cached: bool, shape: str = "emoji") -> Step:
    """diffusers' U-Net, scheduler and towers with PEFT; the lines of its scripts' loop without their logging."""
    import diffusers
    from peft import LoraConfig as PeftConfig

    pipe: Any = diffusers.StableDiffusionPipeline.from_pretrained(locate("emoji"), torch_dtype=torch.float32)
    noising = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    unet = pipe.unet if shape == "emoji" else diffusers.UNet2DConditionModel(cross_attention_dim=768)
    for module in (unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    if kind == "lora":
        layers = ["to_k", "to_q", "to_v", "to_out.0"]
        unet.add_adapter(PeftConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=layers))
    else:
        unet.requires_grad_(True)
    unet.train()
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIM.lr, betas=OPTIM.betas, weight_decay=OPTIM.weight_decay)
    images, captions, _ = pictures(batch)

    @torch.no_grad()
    def latents() -> Tensor:
        return pipe.vae.encode(images).latent_dist.sample() * pipe.vae.config.scaling_factor

    @torch.no_grad()
    def text() -> Tensor:
        ids = pipe.tokenizer(
            captions, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        return pipe.text_encoder(ids)[0]

    kept = (latents(), text()) if shape == "emoji" else (torch.randn(batch, 4, 32, 32), torch.randn(batch, 77, 768))
    half = EngineConfig(precision=cast("Any", precision)).dtype() == torch.bfloat16

    def step() -> float:
        x0, states = kept if cached else (latents(), text())
        noise = torch.randn_like(x0)
        t = torch.randint(0, noising.config.num_train_timesteps, (batch,))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            out = unet(noising.add_noise(x0, noise, t), t, states, return_dict=False)[0]
        loss = their_loss(out, noising.get_velocity(x0, noise, t), preserved=kind == "dreambooth")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def their_loss(out: Tensor, target: Tensor, *, preserved: bool) -> Tensor:
    """As in the scripts: the mean error, with prior preservation that of each half of the batch."""
    if not preserved:
        return F.mse_loss(out.float(), target.float())
    (a, b), (c, d) = out.chunk(2), target.chunk(2)
    return F.mse_loss(a.float(), c.float()) + 1.0 * F.mse_loss(b.float(), d.float())


CASES: dict[str, Callable[..., Step]] = {
    "ldm": ours,
    "diffusers script": functools.partial(theirs, cached=False),
    "diffusers cached": functools.partial(theirs, cached=True),
}
SHAPES = ("emoji", "sd15")


def alone(case: str, kind: str, batch: int, options: Options) -> dict[str, float]:
    """`mib` that steps need above what the process held before, `tensors_mib` of it, and their `text_calls`."""
    arguments = ["--case", case, "--kind", kind, "--batch", str(batch), "--precision", options.precision]
    command = [sys.executable, "-m", "bench.finetune", *arguments, "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory(name: str) -> float:
    """MiB of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


def tensors_peak(step: Step) -> float:
    """MiB of tensors that a step makes, at the fullest moment."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0) / 2**20


def merged_difference() -> float:
    """The largest difference of the U-Net's answer, LoRA attached and its file merged, over the largest answer."""
    pipeline = TextToImage.load("emoji")
    adapter = LoraAdapter(LoraConfig(rank=RANK))
    net = adapter.attach(pipeline.network, pipeline.text)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.05 * torch.randn(p.shape, generator=g))
        x, t = torch.randn(2, 4, 16, 16, generator=g), torch.tensor([100.0, 700.0])
        cond = pipeline.encode_text(list(CAPTIONS))
        attached = net(x, t, cond)
        net.detach()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / lora_files.NAME
            lora_files.write_lora(path, adapter.lora(dict(net.named_parameters())), pipeline.network.config)
            pipeline.load_lora(path)
        return float((pipeline.network(x, t, cond) - attached).abs().max() / attached.abs().max())


def run(options: Options) -> dict[str, Any]:
    """Measure; the peers run on the CPU."""
    batch = 2 if options.quick else 8
    results: dict[str, Any] = {}
    for kind in KINDS:
        cases = {name: make(kind, batch, options.precision) for name, make in CASES.items()}
        seconds = interleaved(cases, options.times(20), warmup=1 if options.quick else 3)
        pairs = [("diffusers script", "ldm"), ("diffusers cached", "ldm")]
        result = report(f"{kind} step, batch {batch}, {options.precision}", seconds, pairs)
        own = {name: alone(name, kind, batch, options) for name in CASES}
        mib = {name: found["mib"] for name, found in own.items()}
        calls = {name: found["text_calls"] for name, found in own.items()}
        share = mib["ldm"] / mib["diffusers script"]
        told = ", ".join(f"{n} {v:.0f}" for n, v in mib.items())
        print(f"  peak memory of steps, MiB: {told}; ldm / diffusers script {share:.3f}")
        tensors = {name: found["tensors_mib"] for name, found in own.items()}
        part = tensors["ldm"] / tensors["diffusers script"]
        told = ", ".join(f"{n} {v:.1f}" for n, v in tensors.items())
        print(f"  of tensors alone, in a step, MiB: {told}; ldm / diffusers script {part:.3f}")
        print(f"  calls of the text tower in {ALONE} steps: " + ", ".join(f"{n} {v}" for n, v in calls.items()))
        result |= {"peak_mib": mib, "peak_share": share, "text_calls": calls}
        result |= {"tensors_mib": tensors, "tensors_share": part}
        result["speedup"] = ratio(seconds, "diffusers script", "ldm").median
        results[kind] = result
    results["merged_difference"] = merged_difference()
    print(f"exported and merged weights against the LoRA that trained: {results['merged_difference']:.1e}")
    return results


def main() -> None:
    """One case's peak memory and calls of text towers, as one line of JSON."""
    p = argparse.ArgumentParser()
    p.add_argument("--case", choices=list(CASES), required=True)
    p.add_argument("--kind", choices=KINDS, required=True)
    p.add_argument("--batch", type=int, required=True)
    p.add_argument("--precision", default="auto")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--shape", choices=SHAPES, default="emoji")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    step = CASES[args.case](args.kind, args.batch, args.precision, shape=args.shape)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    calls = 0

    def count(module: torch.nn.Module, *_: Any) -> None:
        nonlocal calls
        calls += type(module).__name__ in TOWERS

    torch.nn.modules.module.register_module_forward_hook(count)
    for _ in range(ALONE):
        step()
    told = {"mib": memory("VmHWM") - before, "text_calls": calls}  # before the profiler, which holds much itself
    print(json.dumps(told | {"tensors_mib": tensors_peak(step)}))


if __name__ == "__main__":
    main()
