"""The main job from data to gallery: train a small model, draw with it and with the shipped one, measure, show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ldm.config.schema import RunConfig
from ldm.data.grid import sheet, to_pil
from ldm.data.loader import DataConfig, Loader
from ldm.data.mixture import main_source
from ldm.demo import edits, models
from ldm.demo.page import DemoResults, RetrievalFigure, write_demo_page
from ldm.demo.shown import shown
from ldm.diffusion import Discrete, Flow
from ldm.evaluate import measure
from ldm.metrics.clip_score import nearest
from ldm.metrics.retrieval import Retrieval
from ldm.models.shipped import STUDENTS
from ldm.pipeline import ImagePrompt, Settings, TextToImage
from ldm.precision import DTYPES
from ldm.recipes.image_prompts import load_pair
from ldm.recipes.sources import load_clip
from ldm.rng import Rng
from ldm.web.chart import Curve
from ldm.web.gallery import Fact, Picture

PROMPTS = (
    "a red apple", "a smiling face with sunglasses", "cat", "a pizza", "a red heart", "police car", "banana", "an owl",
)  # fmt: skip
HERO = (
    *PROMPTS,
    "hamburger", "woman firefighter, medium-dark skin tone", "guitar", "man artist, light skin tone",
    "a snowman", "airplane", "person in lotus position, dark skin tone", "sunflower",
)  # fmt: skip
STEP_COUNTS = (1, 2, 4, 8, 16, 50, 250, 1000)
ROWS = {"ddpm": 1000, "ddim": 1000, "dpmpp_2m": 250, "unipc": 50, "euler": 50, "heun": 50}
FEW_STEPS = (1, 2, 4, 8)
STUDENT = ("emoji_128", STUDENTS["emoji_128"])
"""The teacher and what was distilled from it."""
IP_ADAPTER, IMAGE_SCALES = "ip_adapter_emoji", (1.0, 0.6)
SCALES = (1.0, 2.0, 3.0, 5.0, 8.0, 12.0)


@dataclass
class Clock:
    """Seconds of each part, for the last table."""

    parts: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    def lap(self, name: str) -> float:
        """Close a part."""
        now = time.monotonic()
        self.parts[name] = now - self._last
        self._last = now
        return self.parts[name]


class Scorer:
    """The shipped CLIP as the judge."""

    def __init__(self, source: str, data: str) -> None:
        self.clip, self.config = load_clip(source)
        self.data = data

    def measure(self, pipeline: TextToImage | None, split: str, count: int, settings: Settings) -> Retrieval:
        """Retrieval of pictures that a model draws of a split's captions, or of the real ones."""
        drawn = measure.draw(self.data, split, count)
        if pipeline is None:
            images = measure.real_pictures(self.data, split, drawn.ids, self.config.image_size)
        else:
            images = pipeline.sample(drawn.captions, settings=settings)
        return measure.retrieval_of(images, drawn.captions, drawn.pool, self.clip, self.config)

    def image_features(self, images: Tensor) -> Tensor:
        """Unit image features (N, D)."""
        return measure.clip_features(images, self.clip, self.config)


@dataclass
class Demo:
    """The parts that all sections share."""

    config: RunConfig
    out: Path
    shipped: TextToImage
    scorer: Scorer
    settings: Settings
    say: Callable[[str], None]
    clock: Clock = field(default_factory=Clock)
    results: DemoResults = field(default_factory=DemoResults)

    def shown(self, **changes: object) -> DataConfig:
        """The training pictures, as large as the shipped model draws."""
        return replace(main_source(self.config.data), size=self.shipped.size(None)[0], **changes)  # type: ignore[arg-type]

    def draw(self, pipeline: TextToImage, prompts: Sequence[str], **changes: object) -> list[Image.Image]:
        """One picture a prompt, from the same noise whatever the pipeline."""
        return to_pil(pipeline.sample(prompts, settings=replace(self.settings, **changes)))  # type: ignore[arg-type]


def train(config: Path, overrides: Sequence[str], procs: int) -> None:
    """Start `ldm train` on several processes and wait. Raises RuntimeError when it fails."""
    command = [sys.executable, "-m", "launch", "local", "--procs", str(procs), "--"]
    command += [sys.executable, "-m", "ldm.cli", "train", str(config), *overrides]
    process = subprocess.Popen(command, env={**os.environ, "TORCHDYNAMO_DISABLE": "1"})
    try:
        code = process.wait()
    except KeyboardInterrupt:  # which the launcher has got too: its ranks save
        process.wait()
        raise
    if code:
        raise RuntimeError(f"training ended with exit code {code}: {' '.join(command)}")


def run(demo: Demo, config_file: Path, overrides: Sequence[str], procs: int) -> Path:
    """Everything; the page's path."""
    r, say = demo.results, demo.say
    data = Loader(demo.shown(captions="first", shuffle=True), seed=1, micro_batch=64)
    batch = data.batch(0, 0)
    pictures = to_pil(batch["image"])
    r.data = [Picture(pictures[i], batch["caption"][i]) for i in shown(batch["caption"], 40)]
    r.data_text = _data_text(len(data.samples), demo)
    noising(demo, batch["image"][:1])
    demo.clock.lap("reading the data, noising a picture")

    r.prompts = PROMPTS
    stages = {"before": demo.draw(models.untrained(demo.config), PROMPTS)}
    demo.clock.lap("drawing before training")
    say(f"training a small U-Net on {procs} processes ...")
    train(config_file, overrides, procs)
    minutes = demo.clock.lap("encoding the data once, and training") / 60
    trained = models.trained(demo.out)
    spent = f"{minutes:.0f} minute{'' if round(minutes) == 1 else 's'}"
    stages[f"after {spent}"] = demo.draw(trained, PROMPTS)
    stages["the shipped model"] = demo.draw(demo.shipped, PROMPTS)
    r.stages = stages
    r.loss = [_curve(demo.out / "log" / "metrics.jsonl")]
    r.loss_text = (
        f"A U-Net of {_parameters(trained) / 1e6:.1f} million parameters starts from random weights and sees "
        f"{demo.config.train.steps * demo.config.train.batch:,} noised latents, on {procs} processes under DeepSpeed."
    )
    for name in _SECTIONS:
        say(f"{name} ...")
        _SECTIONS[name](demo, trained)
        demo.clock.lap(name)
    return finish(demo, minutes)


def _parameters(pipeline: TextToImage) -> int:
    return sum(p.numel() for p in pipeline.network.parameters())


def _data_text(count: int, demo: Demo) -> str:
    data = main_source(demo.config.data)
    held = len(Loader(replace(data, split="heldout"), seed=0, micro_batch=1).samples)
    combinations = len(Loader(replace(data, split="compositional"), seed=0, micro_batch=1).samples)
    return (
        f"{count:,} pictures with captions train the model. {held} pictures of other concepts and {combinations} "
        "combinations of profession, gender and skin tone are kept away from it. Pictures: Fluent Emoji by "
        "Microsoft, MIT licence; captions from Emojibase, MIT licence."
    )


def _curve(path: Path) -> Curve:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "loss" in row]
    return Curve("training loss", [row["step"] for row in rows], [row["loss"] for row in rows], smooth=0.9)


def noising(demo: Demo, image: Tensor) -> None:
    """x_t of one picture (1, 3, H, W) over time, the same noise for each schedule."""
    schedules = {
        "linear": Discrete(betas="linear", beta_start=1e-4, beta_end=0.02),
        "scaled linear": Discrete(betas="scaled_linear"),
        "… to zero SNR": Discrete(betas="scaled_linear", zero_terminal_snr=True),
        "cosine": Discrete(betas="cosine"),
        "sigmoid": Discrete(betas="sigmoid", beta_start=1e-4, beta_end=0.02),
        "rectified flow": Flow(),
    }
    noise = Rng(0, (0,)).normal("noising", image.shape[1:])
    fractions = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    rows = {}
    for name, schedule in schedules.items():
        span = schedule.last - schedule.first
        times = [torch.tensor([round(schedule.first + f * span, 3 if span < 2 else 0)]) for f in fractions]
        pairs = [schedule.alpha_sigma(t.long() if schedule.discrete else t) for t in times]
        rows[name] = to_pil(torch.cat([a.view(-1, 1, 1, 1) * image + s.view(-1, 1, 1, 1) * noise for a, s in pairs]))
    demo.results.noising = rows
    demo.results.noising_times = [f"t = {f:g} T" for f in fractions]


def samplers(demo: Demo, trained: TextToImage) -> None:
    """One prompt and one noise at every count of steps; dear combinations are left empty."""
    rows: dict[str, list[Image.Image | None]] = {}
    for name, most in ROWS.items():
        rows[name] = [
            demo.draw(demo.shipped, [PROMPTS[1]], sampler=name, steps=n)[0] if n <= most else None for n in STEP_COUNTS
        ]
    demo.results.sampler_steps, demo.results.samplers = STEP_COUNTS, rows
    demo.results.sampler_text = (
        f"“{PROMPTS[1]}” from one noise, by the shipped model at guidance {demo.settings.guidance:g}."
    )


def few_steps(demo: Demo, trained: TextToImage) -> None:
    """A shipped student and its teacher, the same noise at each count of steps."""
    precision = next(name for name, dtype in DTYPES.items() if dtype == demo.shipped.dtype)
    whole, student = (TextToImage.load(n, device=demo.shipped.device, precision=precision) for n in STUDENT)
    prompts = ("a red apple", "cat", "police car")
    scale = demo.settings.guidance
    teacher = [demo.draw(whole, prompts, sampler="euler", steps=n) for n in FEW_STEPS]
    own = [demo.draw(student, prompts, sampler="lcm", steps=n, guidance=1.0) for n in FEW_STEPS]
    rows: dict[str, list[Image.Image | None]] = {}
    for i, prompt in enumerate(prompts):
        rows[f"“{prompt}”, teacher: Euler, guidance {scale:g}"] = [column[i] for column in teacher]
        rows[f"“{prompt}”, student: LCM, guidance inside"] = [column[i] for column in own]
    demo.results.few_steps, demo.results.few_step_counts = rows, FEW_STEPS


def image_prompts(demo: Demo, trained: TextToImage) -> None:
    """Pictures of concepts that no training has seen, as prompts of the shipped IP-Adapter's model."""
    adapter, encoder = load_pair(IP_ADAPTER)
    model = TextToImage.load("emoji", device=demo.shipped.device)
    plain = demo.shown(split="heldout", captions="first", shuffle=True)
    pictures = to_pil(Loader(plain, seed=5, micro_batch=8).batch(0, 0)["image"])
    rows: dict[str, list[Image.Image | None]] = {"the prompt": [*pictures]}
    for scale in IMAGE_SCALES:
        shown = ImagePrompt(adapter=adapter, encoder=encoder, picture=pictures, scale=scale, each=True)
        rows[f"scale {scale:g}"] = [*demo.draw(model.image_prompted([shown]), [""] * len(pictures))]
    demo.results.image_prompts = rows


def guidance(demo: Demo, trained: TextToImage) -> None:
    """The same noise at each scale."""
    prompts = ("a red apple", "woman firefighter, medium-dark skin tone", "police car")
    drawn = [demo.draw(demo.shipped, prompts, guidance=s) for s in SCALES]
    demo.results.guidance_scales = SCALES
    demo.results.guidance = {p: [column[i] for column in drawn] for i, p in enumerate(prompts)}


def heldout(demo: Demo, trained: TextToImage) -> None:
    """Prompts of both held-out splits beside the true pictures."""
    for split, into in (("compositional", "compositional"), ("heldout", "heldout")):
        plain = demo.shown(split=split, captions="first", shuffle=True)
        batch = Loader(plain, seed=3, micro_batch=6).batch(0, 0)
        prompts = [p for p in batch["caption"] for _ in range(4)]
        drawn = demo.draw(demo.shipped, prompts)
        true = to_pil(batch["image"])
        rows = {c: (drawn[4 * i : 4 * i + 4], [true[i]]) for i, c in enumerate(batch["caption"])}
        setattr(demo.results, into, rows)


def retrieval(demo: Demo, trained: TextToImage) -> None:
    """R@1 among 64 captions: this training's pictures, the shipped model's, and real ones."""
    figures = []
    plan = (
        ("this demo's model, training captions", trained, "train", 128),
        ("shipped model, training captions", demo.shipped, "train", 128),
        ("shipped model, unseen combinations", demo.shipped, "compositional", 128),
        ("shipped model, unseen concepts", demo.shipped, "heldout", 64),
        ("real pictures, training captions", None, "train", 128),
        ("real pictures, unseen combinations", None, "compositional", 128),
    )
    for label, pipeline, split, count in plan:
        measured = demo.scorer.measure(pipeline, split, count, demo.settings)
        found = measured.at(1)
        figures.append(RetrievalFigure(
            label=label, rate=found.rate, low=found.low, high=found.high, chance=found.chance, images=measured.images,
        ))  # fmt: skip
        demo.say(f"  {label}: R@1 {found.rate:.3f}, {found.times_chance:.1f} x chance")
    demo.results.retrieval = figures
    demo.results.retrieval_text = (
        "The shipped CLIP looks at each picture and picks, among 64 captions, the one that suits it best. "
        "Guessing is right once in 64. Real pictures show how far the judge itself can be trusted."
    )


def neighbours(demo: Demo, trained: TextToImage) -> None:
    """Training pictures nearest in CLIP's image features to pictures made."""
    plain = demo.shown(captions="first", shuffle=False)
    bank = Loader(plain, seed=0, micro_batch=len(Loader(plain, seed=0, micro_batch=1).samples)).batch(0, 0)
    features = demo.scorer.image_features(bank["image"])
    prompts = [*PROMPTS[:4], *demo.results.compositional][:8]
    made = demo.shipped.sample(prompts, settings=demo.settings)
    scores, rows = nearest(demo.scorer.image_features(made), features, 4)
    shown = to_pil(made)
    found = []
    for i, prompt in enumerate(prompts):
        near = [
            Picture(to_pil(bank["image"][j : j + 1])[0], bank["caption"][j], f"{s:.2f}")
            for j, s in zip(rows[i].tolist(), scores[i].tolist(), strict=True)
        ]
        found.append((Picture(shown[i], prompt), near))
    demo.results.neighbours = found


def editing(demo: Demo, trained: TextToImage) -> None:
    """Each editing method once."""
    given = [p for p in demo.results.data if p.caption]
    demo.results.edits = edits.rows(demo.shipped, demo.settings, [p.image for p in given])


_SECTIONS = {
    "samplers": samplers,
    "few steps": few_steps,
    "guidance": guidance,
    "image prompts": image_prompts,
    "held-out prompts": heldout,
    "retrieval": retrieval,
    "nearest neighbours": neighbours,
    "editing": editing,
}


def finish(demo: Demo, minutes: float) -> Path:
    """Facts, costs and the page; a contact sheet beside it."""
    r = demo.results
    hero = demo.draw(demo.shipped, HERO)
    r.hero = [Picture(p, c) for p, c in zip(hero, HERO, strict=True)]
    sheet(hero, 8).save(demo.out / "contact_sheet.png")
    own, ship, comb = r.retrieval[:3]
    r.facts = [
        Fact(f"{minutes:.0f} min", "from random weights to pictures", f"{demo.config.train.batch} pictures a step"),
        Fact(f"{own.rate / own.chance:.0f} ×", "chance: this run's pictures find their caption", "R@1 of 64"),
        Fact(f"{ship.rate / ship.chance:.0f} ×", "chance: the shipped model, training captions", "R@1 of 64"),
        Fact(f"{comb.rate / comb.chance:.0f} ×", "chance: combinations it never saw", "R@1 of 64"),
    ]
    demo.clock.lap("the best pictures")
    r.cost_header = ("what", "seconds")
    r.costs = [*((name, f"{s:.0f}") for name, s in demo.clock.parts.items())]
    r.costs = [*r.costs, ("all", f"{sum(demo.clock.parts.values()):.0f}")]
    r.commands = (
        'ldm sample "a red apple" "a smiling face with sunglasses"',
        "python -m launch local --procs 2 -- ldm train configs/train/text_to_image_emoji.yaml",
        "ldm evaluate retrieval --model emoji_128 --split compositional",
    )
    r.lede = (
        "A latent diffusion model, trained a moment ago on this machine, and the one that comes with the package: "
        "an autoencoder, a CLIP and a U-Net, all made by this project."
    )
    figures = {"retrieval": [vars(f) for f in r.retrieval], "seconds": demo.clock.parts}
    (demo.out / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return write_demo_page(r, demo.out / "gallery.html")


__all__ = ["Demo", "Scorer", "run"]
