"""What the planner's jobs share: how a run is divided, its data, its loss as a network, what stays frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.loader import DataConfig
from ldm.data.manifest import Manifest, resolve
from ldm.data.mixture import Data
from ldm.models.fit import check_fit, given, tokens
from ldm.models.fit import told as told_cond
from ldm.models.frozen import Storage
from ldm.models.network import Granularity, Network
from ldm.models.text import QwenConfig, T5Config, TextEncoder, TextPrecision, TextTower
from ldm.models.transformers.base import Transformer
from ldm.models.vae.autoencoder import Autoencoder
from ldm.objectives import Objective
from ldm.pipeline import TextToImage
from ldm.plan.flops import count_flops
from ldm.plan.links import ZeroPP
from ldm.plan.memory import Layout
from ldm.plan.report import Frozen, Job
from ldm.plan.streaming import Streamed
from ldm.recipes import planned_frozen
from ldm.recipes.pictures import entries
from ldm.recipes.planned_models import check_size
from ldm.rng import Rng
from ldm.train.packages import check_divided
from ldm.train.trainer import TrainConfig
from ldm.types import Cond

HOW_MANY = "--samples N tells how many there will be"
NO_CACHE = "no cache: VAE and text tower run for every image of every step; set task.cache to encode once"
FULL_LENGTH = "data: cached text is counted at full length, the most that it can be; captions take what they are long"
TEXT = ("text", "pooled", "mask")
"""Keys of what text encoders give."""
_MOMENTS = {"adamw8bit": 0.5, "lion": 1.0, "sgd": 1.0, "adafactor": 0.0, "came": 1.0, "prodigy": 4.0}
"""Of other optimizers than AdamW, in float32 values a weight; means of rows and columns are next to none."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is planned: the run's `name`, the number of processes, and whether they are GPUs."""

    name: str
    world: int
    gpu: bool


def layout(train: TrainConfig, asked: Asked) -> Layout:
    """How the run is divided. Raises ValueError where the optimizer's state cannot be."""
    check_divided(train.optim.algorithm, train.engine, asked.world)
    engine = train.engine
    return Layout(
        stage=engine.zero_stage,
        world=asked.world,
        half=engine.precision == "fp16",
        copies=0 if train.ema is None else 1 + len(train.ema.others) + len(train.ema.power),
        moments=_MOMENTS.get(train.optim.algorithm, 2.0),
        hidden_moments=1.0 if train.optim.algorithm == "muon" else None,
        bucket=engine.bucket,
        live=engine.live,
        overlap=asked.gpu,
        accumulate=train.accumulate,
        offload_optimizer=engine.offload_optimizer,
        offload_parameters=engine.offload_parameters,
        zeropp=ZeroPP(
            part=engine.hpz_partition, weights=engine.quantized_weights, gradients=engine.quantized_gradients
        ),
    )


def precision(train: TrainConfig, gpu: bool) -> torch.dtype:
    """What the forward computes in on the planned hardware: the GPUs of a plan have bf16, the CPU counts in float32."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": torch.bfloat16}
    return named[train.engine.precision] if gpu else torch.float32


def frozen(
    vae: Autoencoder, towers: Sequence[TextEncoder], pixels: int, cached: bool, text: TextPrecision, storage: Storage,
    trains: bool = False,
) -> list[Frozen]:  # fmt: skip
    """The networks that stay on the GPU beside the trained one; they run for each image where nothing is cached.

    `trains`: the text encoders themselves do, beside copies that stay as they are.
    """
    said = "fp32" if trains else storage
    flops = 0 if cached else count_flops(vae.encode, torch.empty(1, 3, pixels, pixels, device="meta"))
    found = [Frozen(name="vae", bytes=planned_frozen.autoencoder(vae, storage), flops=float(flops))]
    for i, tower in enumerate(towers):
        flops = 0 if cached else _text_flops(tower)
        found.append(Frozen(name=f"text {i + 1}", bytes=planned_frozen.text(tower, said, text), flops=float(flops)))
    return found


def _text_flops(encoder: TextEncoder) -> float:
    """Operations of one prompt as long as it may be; none of an encoder that is left out."""
    if next(encoder.parameters(), None) is None:
        return 0.0
    count = tokens(encoder.config)
    if isinstance(encoder, TextTower):
        return float(count_flops(encoder.model, torch.zeros(1, count, dtype=torch.int64, device="meta")))
    states = torch.empty(1, count, encoder.table.embedding_dim, device="meta")
    return float(count_flops(lambda x: encoder.model(inputs_embeds=x).last_hidden_state, states))


def side(data: Data) -> int:
    """The pictures' side in pixels, the largest of a mixture's."""
    return data.size if isinstance(data, DataConfig) else max(s.data.size for s in data.sources)


def samples_of(data: Data, encoded: float, cached: bool, said: list[str]) -> tuple[int | None, float]:
    """Samples and bytes of one as training reads it: `encoded` in a cache, else as stored."""
    sources = [data] if isinstance(data, DataConfig) else [s.data for s in data.sources]
    samples, size = 0, 0.0
    for source in sources:
        try:
            manifest = Manifest.read(resolve(source.path), source.remote)
        except (ValueError, OSError) as error:
            said.append(f"{error}; {HOW_MANY}")
            return None, encoded if cached else 0.0
        shards = manifest.split(source.split)
        samples += sum(s.samples for s in shards)
        size += sum(s.bytes for s in shards)
        if cached and manifest.cached is None:
            size = encoded * samples
    return samples, size / max(1, samples)


def told(job: Job, samples: int) -> Job:
    """The job with a number of samples that its data set does not tell yet."""
    known = tuple(w for w in job.warnings if HOW_MANY not in w)
    return replace(job, samples=samples, warnings=known)


def pictures_in(*folders: Path) -> int | None:
    """How many pictures there are in folders or built sets, None where one of them has none."""
    try:
        return sum(len(entries(folder)) for folder in folders)
    except (ValueError, OSError):
        return None


def check_cache(cache: Path | None, cached: bool, said: list[str], text: Sequence[TextEncoder] = ()) -> None:
    """Say what a cache that is not there, or none, costs, and what of `text` in it cannot be known before."""
    if not cached:
        said.append(NO_CACHE)
    elif cache is not None:
        if not (Path(cache) / "manifest.json").is_file():
            said.append(f"task.cache: nothing in {str(cache)!r} yet: the run encodes everything first, once")
        if any(isinstance(encoder.config, (T5Config, QwenConfig)) for encoder in text):
            said.append(FULL_LENGTH)


class Loss(nn.Module):
    """An objective as a network from a batch to its loss; only what trains is registered."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: dict[str, Any]) -> Tensor:
        return self.objective(batch, Rng.of(0, batch["position"]))[0]


def loss_job(
    asked: Asked,
    data: Data,
    train: TrainConfig,
    build: Callable[[bool], nn.Module],
    inputs: Callable[[int], tuple[Any, ...]],
    *,
    frozen: Sequence[Frozen] = (),
    recompute: bool = False,
    said: list[str],
    cached: bool = False,
    reads: Sequence[str] = ("moments", *TEXT),
    streamed: Streamed | None = None,
    asked_again: float = 0.0,
    stored: float = 0.0,
    element: int = 2,
) -> Job:
    """A job whose step is counted from its loss. `reads`: what of a batch is stored in a cache, latents and text in
    `element` bytes, which takes `stored` bytes a sample more. `asked_again`: `Job.asked`.
    """
    batch = inputs(1)[0]
    read = {key: value for key, value in batch.items() if {key, key.partition(".")[0]} & {*reads}}
    encoded = stored + sum(float(value.numel() * _element(key, value, element)) for key, value in read.items())
    samples, size = samples_of(data, encoded, cached, said)
    return Job(
        name=asked.name, build=build, inputs=inputs, flops=None, batch=train.batch, steps=train.steps,
        layout=layout(train, asked), recompute=recompute, precision=precision(train, asked.gpu),
        frozen=tuple(frozen), samples=samples, sample_bytes=size, warnings=tuple(said), streamed=streamed,
        asked=asked_again,
    )  # fmt: skip


def _element(key: str, value: Tensor, encoded: int) -> int:
    """Bytes of an element in a cache: pictures are stored as they are, features in float16."""
    if key.endswith("moments") or key.partition(".")[0] in TEXT:
        return encoded
    return 1 if value.ndim == 4 else 2


def again(how: Granularity, recompute: bool) -> Granularity:
    """What is computed twice in the plan's rows with recomputation: what is configured, or whole blocks."""
    return "none" if not recompute else "block" if how == "none" else how


def attention(gpu: bool) -> list[str]:
    """What is said of towers that train."""
    return ["attention of text and picture towers that train is counted in float32"] if gpu else []


def fits(model: TextToImage, data: Data, key: str, source: str, more: int = 0) -> None:
    """Raise ValueError where the model's parts do not fit each other, or the data's size does not fit it.

    `more`: channels that are concatenated to the latents.
    """
    told = f"{key} {source!r}"
    check_fit(
        model.network.config, tuple(t.config for t in model.text), model.codec.channels,
        network_key=f"{told}: {model.network.title}", text_key="its text tower", vae_key="its autoencoder",
        more=more,
    )  # fmt: skip
    check_size(side(data), model.codec.factor, "data.size")
    check_patches(model.network, model.codec.factor, data)


def check_patches(network: Network, factor: int, data: Data) -> None:
    """Raise ValueError for pictures that a transformer's patches do not divide; `factor` is the autoencoder's."""
    sides = factor * network.multiple
    for size in [data.size] if isinstance(data, DataConfig) else [s.data.size for s in data.sources]:
        if isinstance(network, Transformer) and size % sides:
            raise ValueError(
                f"data.size: {size} is not a multiple of {sides}, which the {network.title}'s patches take"
            )


def copied(model: TextToImage) -> TextToImage:
    """A copy that an adapter may change."""
    other = copy.copy(model)
    other.network, other.text = copy.deepcopy(model.network), copy.deepcopy(model.text)
    return other


def states(model: TextToImage) -> Callable[[Sequence[str]], Cond]:
    """Prompts -> conditioning of the right shape, computed by nobody: a cache's, or of frozen encoders."""

    def encode(prompts: Sequence[str]) -> Cond:
        return given(_configs(model), len(prompts), device="cpu")

    return encode


def _configs(model: TextToImage) -> tuple[Any, ...]:
    return tuple(encoder.config for encoder in model.text)


def positions(batch: int) -> dict[str, Any]:
    """One sample many times, so that counts are linear in the batch; one whose time is late, as those work most."""
    late = max(range(100), key=lambda p: float(Rng.of(0, [p]).uniform("time")))
    return {"position": torch.full((batch,), late), "weight": torch.ones(batch), "key": ["a"] * batch}


def latents(model: TextToImage, data: Data, batch: int) -> dict[str, Any]:
    """A batch as a cache gives it; its captions are read where the towers train."""
    size = side(data) // model.codec.factor
    found = positions(batch) | {
        "moments": torch.empty(batch, 2 * model.codec.channels, size, size, device="meta"),
        "caption": ["a"] * batch,
    }
    found |= {k: v for k, v in told_cond(model.network, _configs(model), batch).items() if k.partition(".")[0] in TEXT}
    if "time_ids" in model.network.needs:
        found |= {k: torch.zeros(batch, 2) for k in ("original_size", "crop_top_left", "target_size")}
    return found


def beside(
    model: TextToImage,
    data: Data,
    cached: bool,
    live: bool,
    text: TextPrecision,
    storage: Storage,
    trains: bool = False,
) -> list[Frozen]:
    """VAE and text towers. Towers that train have copies for the sample pictures, or are frozen below corrections."""
    found = frozen(model.codec.autoencoder, model.text, side(data), cached, text, storage, trains)
    return [replace(f, flops=0.0) if live and f.name != "vae" else f for f in found]


def drawing_flops(model: TextToImage, pixels: int, evaluations: float, guided: bool) -> float:
    """Operations of drawing one picture: the network's evaluations, two rows each under guidance, and the decoder."""
    size = pixels // model.codec.factor
    cond = told_cond(model.network, _configs(model))
    x = torch.empty(1, model.codec.channels, size, size, device="meta")
    once = count_flops(model.network, x, torch.empty(1, device="meta"), cond)
    return evaluations * (2 if guided else 1) * once + count_flops(model.codec.autoencoder.decode, x)
