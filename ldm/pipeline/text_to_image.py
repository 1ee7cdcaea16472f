"""Text to image: prompts -> pictures, with any sampler, from any model folder.

Legend: B pictures of a batch, Z latent channels, h, w latent pixels.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from ldm import allocator
from ldm.checkpoint import students
from ldm.checkpoint.scheduler_classes import OwnSampler, Plan
from ldm.data.grid import to_pil
from ldm.diffusion.augmentation import NoiseAugmentation
from ldm.diffusion.process import Process
from ldm.models.attention import sliced
from ldm.models.families import Family
from ldm.models.layers import unchanging
from ldm.models.network import Network
from ldm.models.streaming import check_count
from ldm.models.text import TextEncoder, TextPrecision, check_text_precision
from ldm.models.transformers.times import known_times
from ldm.models.vae.latents import LatentCodec
from ldm.pipeline.adapted import Adapted
from ldm.pipeline.concat import Concat
from ldm.pipeline.conditioning import Conditioning, clean_captions, warn
from ldm.pipeline.control import Control, Controls
from ldm.pipeline.image_prompt import ImagePrompt, ImagePrompts
from ldm.pipeline.loading import family_with, habit_of, load_parts
from ldm.pipeline.memory import Placement, compiled
from ldm.pipeline.steps import OwnSteps, guided, skipped, visited
from ldm.precision import chosen, compute_dtype
from ldm.rng import Rng
from ldm.sampling import sample as run_sampler
from ldm.sampling.guidance import told_guidance
from ldm.sampling.memory import check_memory, enough_memory
from ldm.sampling.run import Count as Progress
from ldm.sampling.run import counted, whole
from ldm.sampling.settings import Settings, Size, checked_size
from ldm.types import Cond, Denoise, Net

Wrap = Callable[[Denoise], Denoise]
Guide = Callable[..., Denoise]
"""(denoise, *, prompts) -> a denoiser that steers these prompts' batch."""


class TextToImage(Adapted):
    """A denoising network, a latent codec, text towers and the process that the network was trained for."""

    def __init__(
        self,
        network: Network,
        codec: LatentCodec,
        text: Sequence[TextEncoder],
        process: Process,
        *,
        spacing: str | None = None,
        offset: int = 0,
        end: Literal["data", "first"] | None = None,
        precision: str = "fp32",
    ) -> None:
        """`spacing`, `offset` and `end` are those of the model's own DDIM and DDPM; None is the sampler's."""
        self.offset = offset
        self.end: Literal["data", "first"] | None = end
        self.network, self.codec, self.text, self.process = network, codec, list(text), process
        self.spacing = spacing
        self.student: students.FewSteps | None = None
        self._family: Family | None = None
        self.own: OwnSampler | None = None
        self.augmentation: NoiseAugmentation | None = None
        self.pixels: Size | None = None
        """The size that is drawn where none is asked for; None is the network's own."""
        self._loras = None
        self._place = Placement(next(network.parameters()).device, compute_dtype(precision))
        self._compiled: Net | None = None
        self._controls, self._images = Controls(()), ImagePrompts(())

    @staticmethod
    def load(
        source: str | Path,
        *,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        lenient: bool = False,
        text: str | Path | None = None,
        vae: str | Path | None = None,
        text_precision: TextPrecision | None = None,
        blocks_on_device: int | None = None,
        **which: Any,
    ) -> TextToImage:
        """From a shipped model's name (emoji), a run folder, a diffusers folder, a single file or a hub id.

        `precision` auto, fp32, bf16 or fp16 is of the network's and the text encoders' weights and products; statistics
        of norms, softmax, the sampler and the autoencoder stay in float32. `text_precision`: fp32, bf16, fp16 or int8,
        of the text encoders alone. `lenient` leaves unknown tensors out and names them. `text` and `vae`: folders that
        hold what a transformer's single file lacks. `blocks_on_device` is of `stream`, None for all. Raises ValueError
        when it is none of these. `which`: `ldm.pipeline.loading.Which`, of several weights in a file or folder.
        """
        check_count(blocks_on_device)
        if text_precision is not None:
            check_text_precision(text_precision)
        precision = chosen(precision, device)
        found = load_parts(source, lenient=lenient, text=text, vae=vae, dtype=compute_dtype(precision),
                           text_precision=text_precision, **which)  # fmt: skip
        pipeline = TextToImage(
            found.network, found.codec, found.text, found.process, spacing=found.spacing, offset=found.offset,
            end=found.end, precision=precision,
        )  # fmt: skip
        pipeline.student, pipeline.own, pipeline._family = found.student, found.own, found.family
        pipeline.augmentation = found.augmentation
        pipeline.to(device) if blocks_on_device is None else pipeline.stream(blocks_on_device, device)
        for path in found.loras:
            pipeline.load_lora(path)
        for path in found.embeddings:
            pipeline.load_embedding(path)
        return pipeline

    @property
    def family(self) -> Family:
        """What is usual of the family that the network, and the scheduler it was loaded with, tell."""
        return family_with(self.network, self.process) if self._family is None else self._family

    @property
    def habit(self) -> tuple[str, int, float]:
        """Sampler, steps, guidance where nothing else is asked for: a published transformer's, a Turbo's, or ours."""
        return habit_of(self.family, self.network, self.text)

    def clean_captions(self, on: bool = True) -> None:
        """Clean prompts as PixArt's `clean_caption` does, or only lower them; ValueError for others, or no packages."""
        clean_captions(self.text, self.family.title, on)

    @property
    def unet(self) -> Network:
        """`network`, as diffusers calls it."""
        return self.network

    def with_network(self, network: Network) -> TextToImage:
        """The same pipeline around another network; this one stays as it is."""
        other = copy.copy(self)
        other.network, other._loras, other._compiled, other._place = network, None, None, copy.copy(self._place)
        return other

    def to(self, device: str | torch.device) -> TextToImage:
        """Move all parts; returns itself. In half precision the network's convolutions take channels_last."""
        self._place.move(device, self.network, self.others)
        return self

    def offload(self, device: str | torch.device) -> TextToImage:
        """Keep all parts in the CPU's memory, and move each to `device` only while `sample` uses it; returns itself."""
        self._place.offload(device, self.network, self.others)
        return self

    def stream(self, blocks: int, device: str | torch.device, *, offload: bool = True) -> TextToImage:
        """Keep so many of the network's blocks on `device` at once, and fetch others before they run; returns itself.

        With `offload` text encoders and autoencoder are there only while they are used. `to` ends it. Pictures are the
        same bit by bit. Raises ValueError for a number below 1.
        """
        self._compiled = None
        self._place.stream(blocks, device, self.network, self.others, offload=offload)
        return self

    @property
    def others(self) -> list[torch.nn.Module]:
        """All parts beside the network."""
        return [self.codec.autoencoder, *self.text, *self._controls.networks, *self._images.modules]

    def compile(self, mode: str | None = None) -> TextToImage:
        """Compile the network whole at its first call for each shape (minutes on a CPU); returns itself.

        `mode` is torch.compile's; None takes CUDA graphs on a GPU, for which small batches wait. "blocks" compiles
        equal blocks once instead, in a fraction of the time. Raises ValueError for another word.
        """
        self._compiled = compiled(self.network, self._place.target, mode)
        return self

    def controlled(self, controls: Sequence[Control]) -> TextToImage:
        """This pipeline under ControlNets, which move to it; itself stays. Raises ValueError for another family's."""
        other = copy.copy(self)
        other._controls = Controls(controls).on(self.network, self.codec, self._place)
        return other

    def shown(self, given: Cond) -> TextToImage:
        """This pipeline, told more at every picture: rows (1, ...), or (N, ...), one a prompt; itself stays."""
        (other := copy.copy(self))._controls = self._controls.beside(given)
        return other

    def image_prompted(self, prompts: Sequence[ImagePrompt]) -> TextToImage:
        """This pipeline with pictures as prompts, whose IP-Adapters move to it; itself stays.


        Raises ValueError for one of another family.
        """
        other = copy.copy(self)
        other._images = ImagePrompts(prompts).on(self.network, self._place)
        return other

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self._place.device_of(self.network)

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return self._place.dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self._place.dtype = dtype

    @property
    def conditioning(self) -> Conditioning:
        """What turns prompts into conditioning."""
        return Conditioning(self.network, self.text, self._place, prepare=not self._controls.networks)

    def __call__(self, prompt: str | Sequence[str], *, count: int = 1, **settings: Any) -> list[Image.Image]:
        """`count` pictures of each prompt, one prompt after the other; keywords are those of `Settings`.

        Raises ValueError for a keyword or a value that `Settings` does not have.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return to_pil(self.sample([p for p in prompts for _ in range(count)], settings=Settings.of(settings)))

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        settings: Settings,
        indices: Sequence[int] | None = None,
        progress: Progress | None = None,
        guide: Guide | None = None,
    ) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] on the CPU, one a prompt; warns as `check` does.

        Picture i's noise belongs to (seed, `indices[i]`) alone, so the batch size does not change it. `guide` wraps the
        guided denoiser of each batch's prompts. Raises ValueError for a size that the model cannot make.
        """
        self.check(prompts, settings)
        found: dict[int, Tensor] = {}
        for places, images in self.drawn(prompts, settings=settings, indices=indices, progress=progress, guide=guide):
            found |= zip(places, images, strict=True)
        return torch.stack([found[i] for i in range(len(prompts))])

    @torch.no_grad()
    def drawn(
        self,
        prompts: Sequence[str],
        *,
        settings: Settings,
        indices: Sequence[int] | None = None,
        only: Collection[int] | None = None,
        progress: Progress | None = None,
        guide: Guide | None = None,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """`sample` a batch at a time: places in `prompts` and their pictures, as soon as they are drawn.

        With `only`, these places alone: the batches that they are in are drawn whole, so that every bit is the same.
        """
        indices = list(range(len(prompts)) if indices is None else indices)
        batches = self.batches(prompts, settings)
        chosen = [b for b in batches if only is None or not set(b).isdisjoint(only)]
        for k, places in enumerate(chosen):
            rng = Rng(settings.seed, tuple(indices[i] for i in places))
            step = None if progress is None else counted(progress, k * settings.steps, len(chosen) * settings.steps)
            batch = [prompts[i] for i in places]
            wrap = None if guide is None else functools.partial(guide, prompts=batch)
            with enough_memory(self.size(settings.size), len(batch)):
                given = self._told(self.size(settings.size), places)
                images = self.decode(self.latents(batch, settings, rng, step, wrap=wrap, given=given), settings)
            rows = [row for row, place in enumerate(places) if only is None or place in only]
            yield [places[row] for row in rows], images[rows]

    def batches(self, prompts: Sequence[str], settings: Settings) -> list[list[int]]:
        """Places in `prompts` that are drawn together: in their order, long prompts only with others as long."""
        return self.conditioning.batches(prompts, settings)

    def check(self, prompts: Sequence[str], settings: Settings) -> None:
        """Warn of what may not be drawn as it was meant: parts of prompts, what is cut off, guidance, a far size.

        Raises ValueError without a prompt, and for a size that the model or this machine's memory cannot make.
        """
        if not prompts:
            raise ValueError("expected at least one prompt, got none")
        size, own = self.size(settings.size), self.size(None)
        lines = self.conditioning.cautions(prompts, settings, size, own)
        check_memory(self.codec, size, settings, self.device)
        warn(lines, 3)

    @torch.no_grad()
    def decode(self, latents: Tensor, settings: Settings) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], float32 on the CPU, of scaled latents; see `LatentCodec.draw`."""
        with self._place.used(self.codec.autoencoder), sliced(settings.queries):
            return self.codec.draw(latents, tile=settings.tile, slices=settings.slices).clamp(-1, 1).float().cpu()

    def encode(self, images: Tensor) -> Tensor:
        """Scaled latents (B, Z, h, w), where the network runs, of pictures (B, 3, H, W) in [-1, 1]."""
        with self._place.used(self.codec.autoencoder):
            return self.codec.encode(images.to(self.device))

    def latents(
        self,
        prompts: list[str],
        settings: Settings,
        rng: Rng,
        progress: Callable[[int, Tensor], None] | None = None,
        *,
        x: Tensor | None = None,
        start: Tensor | None = None,
        times: Sequence[float] | None = None,
        wrap: Wrap | None = None,
        given: Cond | None = None,
    ) -> Tensor:
        """Scaled latents (B, Z, h, w) of one batch; `x`, `start` and `times` as in `ldm.sampling.sample`.

        `wrap` changes the guided denoiser; `given` is more that the network is told, such as `concat` makes.
        """
        shape, device = self.latent_shape(settings.size) if x is None else tuple(x.shape[1:]), self.device
        own = self.at((shape[1], shape[2]), settings.steps)
        if own is not self:
            more = {"x": x, "start": start, "times": times, "wrap": wrap, "given": given}
            return own.latents(prompts, settings, rng, progress, **more)
        plan = self._plan(settings)
        plan = plan if times is None else Plan(times, whole=plan.whole)
        denoise = self.denoiser(settings, prompts, plan)
        cond = self._cond(prompts, settings, prompts)
        given = self._told(self.codec.pixels(shape), range(len(prompts))) | (given or {})
        cond |= {key: value.to(device) for key, value in given.items()}
        self.concat.check(cond, wrapped=wrap is not None)
        x = (rng.normal("start", shape) if x is None else x) * (plan.scale if start is None else 1)
        with (
            self._place.used(self.network, *self._controls.networks),
            self._controls.working(settings.steps),
            sliced(settings.queries),
            unchanging(self.network, settings.steps),
            known_times(self.network, [] if self._compiled else visited(plan, settings, self.process.schedule)),
        ):
            return run_sampler(
                settings.sampler,
                denoise if wrap is None else wrap(denoise),
                x.to(device),
                cond,
                start=start,
                times=plan.times,
                schedule=self.process.schedule,
                steps=settings.steps,
                noise=lambda i: rng.normal(f"step {i}", shape).to(device),
                eta=settings.eta,
                spacing=settings.spacing,
                progress=progress,
                clip=plan.clip,
                end=plan.end,
            )

    def at(self, size: tuple[int, int], steps: int) -> TextToImage:
        """This pipeline for latents of height and width `size`: a shift that grows with their tokens is settled."""
        each = self.network.multiple
        schedule = self.process.schedule.of_tokens((size[0] // each) * (size[1] // each), steps)
        if schedule is self.process.schedule:
            return self
        other = copy.copy(self)
        other.process = replace(self.process, schedule=schedule)
        return other

    def denoiser(self, settings: Settings, prompts: Sequence[str] = (), plan: Plan | None = None) -> Denoise:
        """The model's estimate of x_0 under guidance; `prompts`: what it will be asked for, where they may be long.

        `plan`: the steps that will be taken, None those of the settings.
        """
        allocator.keep_freed_memory(self.device.type)
        plan = self._plan(settings) if plan is None else plan
        estimate = lambda net: self.process.denoiser(whole(net) if plan.whole else net)  # noqa: E731
        skipping = skipped(self.network, self._net, settings)
        net = self._controls.around(self._net, lambda: visited(plan, settings, self.process.schedule), self._place)
        denoise = estimate(net)
        without = None if skipping is None else estimate(skipping)
        if self.network.guidance_width is not None:
            if not self.network.guidance_is_scale:
                return told_guidance(denoise, settings.guidance)
            settings = replace(settings, guidance=1.0, guide="cfg", rescale=0.0)  # the conditioning has the scale
        unasked = self._controls.unasked | self._images.unasked
        of = lambda prompt: self._cond([prompt], settings, prompts) | unasked  # noqa: E731
        return guided(denoise, settings, self.process.schedule, of, without, plan.times)

    def _told(self, size: tuple[int, int], rows: Sequence[int]) -> Cond:
        """What pictures tell the network and its ControlNets, for H x W pixels; `rows`: the places in all prompts."""
        return self._controls.told(size, rows) | self._images.told(rows)

    def _net(self, x: Tensor, t: Tensor, cond: Cond, **more: Any) -> Tensor:
        with self._place.autocast(self.network):
            return (self.network if "skip" in more else self._compiled or self.network)(x, t, cond, **more)

    def _cond(self, prompts: Sequence[str], settings: Settings, together: Sequence[str]) -> Cond:
        return self.conditioning.of(prompts, settings, together, self.size(settings.size))

    def _plan(self, settings: Settings) -> Plan:
        steps = OwnSteps(self.spacing, self.offset, self.end, self.student, self.own)
        return steps.plan(settings, self.process.schedule)

    def encode_text(self, prompts: Sequence[str], size: Size | None = None) -> Cond:
        """What the network is given for prompts; SDXL's also for pictures of a size in pixels that are not cropped."""
        return self.conditioning.plain(prompts, self.size(size))

    @property
    def concat(self) -> Concat:
        """What makes of pictures what the network is told by more channels."""
        return Concat(self.network, self.codec, self._place, self.augmentation)

    def latent_shape(self, size: Size | None) -> tuple[int, int, int]:
        """(Z, h, w) for a size in pixels. Raises ValueError unless it is a multiple of 8, or of more for some."""
        factor, size = self.codec.factor, self.pixels if size is None else size
        if size is None:
            side = self.network.side
            return (self.codec.channels, side, side)
        height, width = checked_size(size, max(8, factor * self.network.multiple))
        self.network.check_size(height // factor, width // factor)
        return (self.codec.channels, height // factor, width // factor)

    def size(self, size: Size | None) -> tuple[int, int]:
        """(H, W) in pixels of a size, or of the model's own. Raises ValueError as `latent_shape` does."""
        _, h, w = self.latent_shape(size)
        return (h * self.codec.factor, w * self.codec.factor)
