"""How a row of `ldm evaluate samplers` is measured: pictures of captions, judged by a feature network and a CLIP."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import __version__, dist
from ldm.editing import clip_guide
from ldm.evaluate import divided, measure
from ldm.evaluate.divided import Rows
from ldm.evaluate.sampler_rows import BOUNDS, Case
from ldm.evaluate.statistics import real_features, samples_of
from ldm.metrics import fid, worth
from ldm.metrics.features import FeatureNetwork, extract, in_batches
from ldm.models.text.openclip import AnyClip
from ldm.pipeline import Progress, Settings, TextToImage
from ldm.rng import Rng
from ldm.types import Denoise

SPENT = ("loop_seconds", "text_seconds", "decode_seconds", "network_rows")
"""What a picture costs: its share of its batch's sampling loop, of encoding the prompts, of decoding, in seconds of one
process, none of it spent on measuring; how often the network saw it."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What measures: a feature network, a CLIP, and how many real pictures stand for a split."""

    network: FeatureNetwork
    clip: nn.Module
    clip_config: AnyClip
    clip_name: str
    data: str = "emoji"
    reference: int = 1500
    candidates: int = 64
    seed: int = 0

    def protocol(self) -> dict[str, Any]:
        """What of it a row's figures depend on."""
        return {
            "data": self.data, "seed": self.seed, "network": self.network.name, "candidates": self.candidates,
            **measure.judge_protocol(self.clip_name, self.clip, self.clip_config),
        }  # fmt: skip

    def describe(self, images: Tensor) -> Rows:
        """What `figures` needs of pictures."""
        features = extract(self.network, in_batches(images))
        return {"features": features, "clip": measure.clip_features(images, self.clip, self.clip_config)}

    def figures(self, rows: Rows, captions: Sequence[str], pool: Sequence[str], real: Tensor) -> dict[str, Any]:
        """Kernel distance to the features `real` and retrieval of the captions among those of `pool`."""
        own = rows["features"]
        half = min(len(own), len(real)) // 2  # halves, so that subsets differ and their spread says something
        kid = fid.kernel_distance(real, own, subsets=20, size=max(2, half), seed=self.seed)
        among = measure.candidates(self.candidates, pool)
        found = measure.retrieval_of_features(
            rows["clip"], captions, pool, self.clip, self.clip_config, candidates=among, seed=self.seed
        )
        said = worth.kernel(len(own), len(real), max(2, half)) + worth.rates(len(own))
        said += worth.candidates(self.candidates, among)
        told = {"mean": kid.mean, "std": kid.std, "subset": max(2, half)}
        return {"kernel_distance": told, **found.record(), "warnings": said}


@dataclass(frozen=True)
class Truth:
    """A split's captions in the order in which rows take them, their pictures' ids, and the reference's features."""

    captions: tuple[str, ...]
    ids: tuple[int, ...]
    pool: tuple[str, ...]
    features: Tensor
    reference: tuple[int, ...]

    def of(self, count: int) -> tuple[list[str], list[int]]:
        """`count` captions with their ids; those of a smaller split come round again, with other noise."""
        chosen = [i % len(self.captions) for i in range(count)]
        return [self.captions[i] for i in chosen], [self.ids[i] for i in chosen]


class Measuring:
    """Measures rows; the parts of a row that was stopped are kept in `folder`."""

    def __init__(
        self, folder: Path, judge: Judge, load: Callable[[str], TextToImage], *, batch: int, precision: str
    ) -> None:
        self.folder, self.judge, self.batch, self.precision = folder, judge, batch, precision
        self._load = load
        self._loaded: tuple[str, TextToImage, dict[str, str]] | None = None
        self._truths: dict[tuple[str, int], Truth] = {}

    def protocol(self, case: Case) -> dict[str, Any]:
        """Everything that the row's figures depend on."""
        pipeline, weights = self.model(case.source)
        size = measure.side_of(pipeline)
        truth = self.truth(case.split, size)
        own = {} if pipeline.student is None else {"student_times": pipeline.student.original}
        return own | {
            "measure": "samplers", "version": __version__, **self.judge.protocol(),
            "samples": samples_of(self.judge.data, case.split),
            "split": case.split, "count": case.count, "captions": min(case.count, len(truth.captions)),
            "reference": len(truth.reference), "shared": len({*truth.of(case.count)[1]} & {*truth.reference}),
            "size": size, "model": case.model, "source": case.source,
            "weights": weights, "sampler": case.sampler, "steps": case.steps, "guidance": case.guidance,
            "clip_guidance": case.clip_guidance, "spacing": case.spacing, "precision": self.precision,
        }  # fmt: skip

    def measure(self, case: Case, protocol: dict[str, Any], progress: Progress | None = None) -> dict[str, Any]:
        """The row's figures, with the seconds and the network's rows that each picture took; none but on rank 0."""
        pipeline, _ = self.model(case.source)
        size = measure.side_of(pipeline)
        truth = self.truth(case.split, size)
        captions, ids = truth.of(case.count)

        def describe(part: range) -> Rows:
            if case.sampler in BOUNDS:
                images = measure.real_pictures(self.judge.data, case.split, [ids[i] for i in part], size)
                if case.sampler == "autoencoder":
                    images = _through(pipeline, images, self.batch)
                return self.judge.describe(images)
            images, spent = self._draw(pipeline, case, [captions[i] for i in part], part, progress)
            return self.judge.describe(images) | spent

        rows = divided.described(case.count, self.batch, describe, self.parts(case, protocol))
        if dist.rank():
            return {}
        cost: dict[str, Any] = {f"{name}_per_picture": rows[name].mean().item() for name in SPENT if name in rows}
        if cost:
            cost |= {
                "batch": self.batch, "device": str(pipeline.device), "threads": torch.get_num_threads(),
                "processes": dist.world_size(),
            }  # fmt: skip
        found = cost | self.judge.figures(rows, captions, truth.pool, truth.features)
        if case.sampler not in BOUNDS:
            found["warnings"] += worth.judged(measure.knows_text(pipeline, self.judge.clip))
        return found

    def parts(self, case: Case, protocol: dict[str, Any]) -> divided.Parts:
        """What is kept of a row until all of it is measured."""
        return divided.Parts(self.folder / "parts", case.split, protocol | {"batch": self.batch})

    def _draw(
        self, pipeline: TextToImage, case: Case, captions: list[str], part: range, progress: Progress | None
    ) -> tuple[Tensor, Rows]:
        """One batch: picture i's noise belongs to its global index; what it cost, the same for each of the batch."""
        settings = Settings(
            sampler=case.sampler, steps=case.steps, guidance=case.guidance, spacing=case.spacing,
            seed=self.judge.seed, batch=self.batch,
        )  # fmt: skip
        guide = None
        if case.clip_guidance:
            clip = self.judge.clip.to(pipeline.device)
            guide = clip_guide(pipeline, clip, self.judge.clip_config, case.clip_guidance)
        calls, clock = 0, [_now(pipeline)]

        def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            nonlocal calls
            calls += len(inputs[0])

        def started(denoise: Denoise) -> Denoise:  # the text is encoded, the sampler's loop begins
            clock.append(_now(pipeline))
            return denoise if guide is None else guide(denoise, prompts=captions)

        def step(i: int, _: Tensor) -> None:
            if progress is not None:
                progress(i + 1, case.steps)

        hook = pipeline.network.register_forward_pre_hook(count)
        try:
            latents = pipeline.latents(captions, settings, Rng(settings.seed, tuple(part)), step, wrap=started)
            clock.append(_now(pipeline))
            images = pipeline.decode(latents, settings)
            clock.append(_now(pipeline))
        finally:
            hook.remove()
        text, loop, decode = (b - a for a, b in itertools.pairwise(clock))
        spent = dict(zip(SPENT, (loop, text, decode, calls), strict=True))
        return images, {k: torch.full((len(part),), v / len(part), dtype=torch.float64) for k, v in spent.items()}

    def model(self, source: str) -> tuple[TextToImage, dict[str, str]]:
        """The model and its weights' hashes; the last one stays loaded, after one picture of one step to warm up."""
        if self._loaded is None or self._loaded[0] != source:
            pipeline = self._load(source)
            pipeline.sample([""], settings=Settings(steps=1, guidance=2.0))
            self._loaded = (source, pipeline, measure.model_hashes(pipeline))
        return self._loaded[1], self._loaded[2]

    def truth(self, split: str, size: int) -> Truth:
        """The split at a size; features of the reference are kept in the folder."""
        if (split, size) not in self._truths:
            judge = self.judge
            drawn = measure.draw(judge.data, split, len(measure.caption_pool(judge.data, split)), seed=judge.seed)
            # from the other end, so that rows of few pictures share none with the reference
            chosen = drawn.ids[::-1][: judge.reference]
            features = real_features(judge.network, judge.data, split, chosen, size, self.folder)
            self._truths[split, size] = Truth(drawn.captions, drawn.ids, drawn.pool, features, chosen)
        return self._truths[split, size]


def _now(pipeline: TextToImage) -> float:
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    return time.perf_counter()


@torch.no_grad()
def _through(pipeline: TextToImage, images: Tensor, batch: int) -> Tensor:
    codec = pipeline.codec
    parts = [
        codec.decode(codec.encode(part.to(pipeline.device))).clamp(-1, 1).float().cpu() for part in images.split(batch)
    ]
    return torch.cat(parts)
