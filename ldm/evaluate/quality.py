"""Quality of a model's pictures row by row: which sampler, how many steps, how much guidance; `ldm evaluate samplers`.

Every row is a file, written whole when it is measured, so that a run that was stopped goes on where it was and later
runs add rows. A row says how it was measured; one that was measured otherwise is never mixed in.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import __version__, dist
from ldm.checkpoint import files
from ldm.editing import clip_guide
from ldm.evaluate import divided, measure
from ldm.evaluate.divided import Rows
from ldm.evaluate.quality_table import BOUNDS, line
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
class Entry:
    """A model of the table under its name; what is None is the table's own choice."""

    name: str
    source: str
    samplers: tuple[str, ...] | None = None
    steps: tuple[int, ...] | None = None
    guidance: tuple[float, ...] | None = None
    spacing: str | None = None

    def __post_init__(self) -> None:
        if not self.name or any(c in self.name for c in "/\\ |:="):
            raise ValueError(f"model name {self.name!r}: expected a word without / \\ | : = or spaces")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: `count` pictures of a split's captions, drawn in one way."""

    model: str
    source: str
    split: str
    sampler: str
    steps: int
    count: int
    guidance: float = 1.0
    clip_guidance: float = 0.0
    spacing: str | None = None

    @property
    def name(self) -> str:
        """The row's file, without its ending."""
        if self.sampler in BOUNDS:
            return f"{self.model}-{self.sampler}-{self.split}"
        extra = f"-clip{self.clip_guidance:g}" if self.clip_guidance else ""
        return f"{self.model}-{self.sampler}-{self.steps:04d}-g{self.guidance:g}{extra}-{self.split}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which rows: every sampler at every number of steps, guidance and split, for each model.

    `counts` is (least number of steps, pictures): the last pair whose first number is reached applies, so that rows
    of many steps may have fewer pictures. The kernel distance has no bias, so rows of unequal counts compare.
    """

    models: tuple[Entry, ...]
    samplers: tuple[str, ...]
    steps: tuple[int, ...]
    guidance: tuple[float, ...] = (3.0,)
    clip_guidance: tuple[float, ...] = (0.0,)
    splits: tuple[str, ...] = ("train", "compositional")
    counts: tuple[tuple[int, int], ...] = ((0, 1000),)
    bounds: bool = True

    def __post_init__(self) -> None:
        names = [m.name for m in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"model names must differ, got {names}")
        if any(n < 1 for n in self.steps) or any(count < 2 for _, count in self.counts):
            raise ValueError(f"steps must be at least 1 and counts at least 2, got {self.steps} and {self.counts}")
        if self.counts[0][0] != 0 or any(b[0] <= a[0] for a, b in itertools.pairwise(self.counts)):
            raise ValueError(f"counts: the numbers of steps must rise from 0, got {self.counts}")

    def count(self, steps: int) -> int:
        """Pictures of a row of so many steps."""
        return [pictures for least, pictures in self.counts if steps >= least][-1]

    def cases(self) -> Iterator[Case]:
        """The rows, cheap ones first, so that a stopped run has something of everything."""
        for model, split in itertools.product(self.models[:1] if self.bounds else (), self.splits):
            for sampler in BOUNDS:
                count = self.count(0)
                yield Case(
                    model=model.name, source=model.source, split=split, sampler=sampler, steps=0, count=count
                )  # fmt: skip
        found = []
        for m, split, clip in itertools.product(self.models, self.splits, self.clip_guidance):
            choices = itertools.product(m.samplers or self.samplers, m.steps or self.steps, m.guidance or self.guidance)
            for sampler, steps, guidance in choices:
                found.append(
                    Case(
                        model=m.name,
                        source=m.source,
                        split=split,
                        sampler=sampler,
                        steps=steps,
                        count=self.count(steps),
                        guidance=guidance,
                        clip_guidance=clip,
                        spacing=m.spacing,
                    )
                )
        yield from sorted(found, key=lambda case: case.steps)


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


class Table:
    """Measures the rows of a plan into a folder: `rows/NAME.json`, and all of them together in `results.json`."""

    def __init__(
        self,
        folder: Path,
        judge: Judge,
        load: Callable[[str], TextToImage],
        *,
        batch: int = 32,
        precision: str = "fp32",
    ) -> None:
        self.folder, self.judge, self.batch, self.precision = folder, judge, batch, precision
        self._load = load
        self._loaded: tuple[str, TextToImage, dict[str, str]] | None = None
        self._truths: dict[tuple[str, int], Truth] = {}
        (folder / "rows").mkdir(parents=True, exist_ok=True)

    def run(self, plan: Plan, say: Callable[[str], None], progress: Progress | None = None) -> list[dict[str, Any]]:
        """Measure what is not there yet; all rows of the folder, also those of earlier runs. Collective.

        The ranks divide each row's pictures, rank 0 writes it.
        """
        cases = list(plan.cases())
        for number, case in enumerate(cases, 1):
            path = self.folder / "rows" / f"{case.name}.json"
            protocol = self.protocol(case)
            if divided.on_first_told(functools.partial(_there, path, protocol)):
                continue
            result = self.measure(case, protocol, progress)
            if dist.rank() == 0:
                row = {"protocol": protocol, "result": result}
                files.write_text(path, json.dumps(row, indent=1, ensure_ascii=False) + "\n")
                self._parts(case, protocol).remove(case.count, self.batch)
                say(f"{number}/{len(cases)} {line(row)}")
        rows = read(self.folder)
        if dist.rank() == 0:
            files.write_text(self.folder / "results.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        return rows

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

        rows = divided.described(case.count, self.batch, describe, self._parts(case, protocol))
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

    def _parts(self, case: Case, protocol: dict[str, Any]) -> divided.Parts:
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


def _there(path: Path, protocol: dict[str, Any]) -> bool:
    """Whether a row is measured already. Raises ValueError if it was in another way."""
    if not path.is_file():
        return False
    same(path, json.loads(path.read_text(encoding="utf-8"))["protocol"], protocol)
    return True


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


def same(path: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError, naming the keys, if a row on disk was measured in another way.

    Rows of versions up to 0.1 do not say which samples the data set held.
    """
    free = {"version", "source"} | {"samples"} - was.keys()
    keys = [k for k in now if k not in free and was.get(k) != now[k]]
    if keys:
        told = ", ".join(f"{k} {was.get(k)!r}, now {now[k]!r}" for k in keys)
        raise ValueError(f"{path}: measured with {told}; give another --out, or remove the file to measure it again")


def read(folder: Path) -> list[dict[str, Any]]:
    """All rows of a folder: bounds first, then by model, sampler, guidance and steps."""
    rows = [json.loads(p.read_text(encoding="utf-8")) for p in sorted((folder / "rows").glob("*.json"))]

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        p = row["protocol"]
        bound = p["sampler"] not in BOUNDS
        return bound, p["model"], p["sampler"], p["guidance"], p["clip_guidance"], p["steps"], p["split"]

    return sorted(rows, key=place)
