"""Text to image: prompts -> pictures, with any sampler, from any model folder.

Legend: B pictures of a batch, Z latent channels, h, w latent pixels.
"""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from ldm import allocator
from ldm.adapters.low_rank import Loras
from ldm.checkpoint import students
from ldm.checkpoint.attached import attach_embedding, attach_lora
from ldm.checkpoint.convert import load_model
from ldm.checkpoint.scheduler_classes import OwnSampler, Plan
from ldm.checkpoint.schedulers import scheduler_from_diffusers
from ldm.data.grid import to_pil
from ldm.diffusion.process import Process
from ldm.models.attention import sliced
from ldm.models.layers import unchanging
from ldm.models.shipped import named
from ldm.models.text import TextTower, encode_texts
from ldm.models.text.prompts import count_chunks, encode_prompts, notes, too_long
from ldm.models.unet import UNet
from ldm.models.vae.latents import LatentCodec
from ldm.precision import chosen, compute_dtype
from ldm.rng import Rng
from ldm.sampling import SAMPLERS
from ldm.sampling import sample as run_sampler
from ldm.sampling.guidance import classifier_free, perpendicular, projected, times_of, told_guidance
from ldm.sampling.memory import check_memory, enough_memory
from ldm.sampling.run import Count as Progress
from ldm.sampling.run import counted
from ldm.sampling.settings import Settings, Size, checked_size, far_size, said
from ldm.sampling.times import times as spaced
from ldm.types import Cond, Denoise, Net

log = logging.getLogger(__name__)
KV_BYTES = 1 << 28
"""Up to this size a batch's keys and values of the text are kept for all steps."""

Wrap = Callable[[Denoise], Denoise]
Guide = Callable[..., Denoise]
"""(denoise, *, prompts) -> a denoiser that steers these prompts' batch."""


class TextToImage:
    """A U-Net, a latent codec, text towers and the process that the U-Net was trained for."""

    def __init__(
        self,
        unet: UNet,
        codec: LatentCodec,
        text: Sequence[TextTower],
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
        self.unet, self.codec, self.text, self.process = unet, codec, list(text), process
        self.spacing, self.dtype = spacing, compute_dtype(precision)
        self.student: students.FewSteps | None = None
        self.own: OwnSampler | None = None
        self._loras: Loras | None = None
        self._device = next(unet.parameters()).device
        self._offload = False
        self._compiled: Net | None = None

    @staticmethod
    def load(
        source: str | Path, *, device: str | torch.device = "cpu", precision: str = "fp32", lenient: bool = False
    ) -> TextToImage:
        """From a shipped model's name (emoji), a run folder, a diffusers folder, a single file or a hub id.

        `precision` of the U-Net is auto, fp32, bf16 or fp16 (autocast; the autoencoder stays in float32); `lenient`
        leaves unknown tensors out and names them. Raises ValueError when it is none of these.
        """
        found = named(source)
        for folder in (found, found / "export"):
            if (folder / "adapter.json").is_file():
                return _adapted(folder, device, precision, lenient)
        if (found / "checkpoints").is_dir() and not (found / "export" / "model_index.json").is_file():
            raise ValueError(f"run {str(source)!r}: not exported yet; the export is written when training ends")
        parts = load_model(found / "export" if (found / "export").is_dir() else found, lenient=lenient)
        how = scheduler_from_diffusers(parts.scheduler)
        process = Process(schedule=how.schedule, prediction=how.prediction, variance=how.variance)
        unet = parts.unet.eval().requires_grad_(False)
        parts.codec.autoencoder.eval().requires_grad_(False)
        pipeline = TextToImage(
            unet, parts.codec, parts.text, process, spacing=how.spacing, offset=how.offset,
            end="data" if how.last_alpha_one else "first", precision=chosen(precision, device),
        )  # fmt: skip
        pipeline.student = students.few_steps(parts.scheduler, guided=unet.config.time_cond_proj_dim is None)
        pipeline.own = how.own
        if how.unlike:
            log.warning("%s: its own scheduler does not draw here, the samplers do (%s)", source, how.unlike)
        return pipeline.to(device)

    def to(self, device: str | torch.device) -> TextToImage:
        """Move all parts; returns itself. In half precision the U-Net's convolutions take channels_last."""
        self._device, self._offload = torch.device(device), False
        for module in (self.unet, self.codec.autoencoder, *self.text):
            module.to(device)
        self.unet.to(memory_format=torch.contiguous_format if self.dtype == torch.float32 else torch.channels_last)
        return self

    def offload(self, device: str | torch.device) -> TextToImage:
        """Keep all parts in the CPU's memory, and move each to `device` only while `sample` uses it; returns itself."""
        self.to("cpu")
        self._device = torch.device(device)
        self._offload = self._device.type != "cpu"
        if not self._offload:
            log.info("offload to the cpu: nothing to do, the model runs there")
        return self

    @contextmanager
    def _used(self, *parts: torch.nn.Module) -> Iterator[None]:
        """The parts on the device inside, where they are offloaded."""
        for part in parts if self._offload else ():
            part.to(self._device)
        try:
            yield
        finally:
            for part in parts if self._offload else ():
                part.to("cpu")

    def compile(self, mode: str | None = None) -> TextToImage:
        """Compile the U-Net whole at its first call for each shape (minutes on a CPU); returns itself.

        `mode` is torch.compile's; None takes CUDA graphs on a GPU, for which small batches wait.
        """
        graphs = "reduce-overhead" if self._device.type == "cuda" else "default"
        compiled = torch.compile(self.unet, fullgraph=True, mode=mode or graphs)

        def call(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(x, t, cond).clone()  # a graph writes its next answer over this one

        self._compiled = call
        return self

    def load_lora(
        self, path: str | Path, weight: float = 1.0, *, name: str | None = None, lenient: bool = False
    ) -> str:
        """Merge a LoRA file, a PEFT folder or a run into the weights; the name to change or unload it by.

        Embeddings that the file bundles are added too. Raises ValueError for a file that does not fit this model; with
        `lenient` what does not fit is left out and named, as long as something fits.
        """
        name = Path(path).stem if name is None else name
        return attach_lora(self._merged(), self.unet, self.text, path, weight, name, lenient)

    def set_loras(self, weights: Mapping[str, float]) -> None:
        """Change the weights of loaded LoRAs by name; 0 is as without."""
        self._merged().set(weights)

    def unload_loras(self, *names: str) -> None:
        """Take out the LoRAs named, or all; the model's weights are then exactly what they were."""
        self._merged().remove(*names)

    def load_embedding(self, path: str | Path, token: str | None = None) -> list[str]:
        """Teach the towers the tokens of a textual-inversion file (diffusers' or A1111's) or run; what prompts say.

        A file of one token is called by its own name too. `token` renames the only one. Raises ValueError when it does
        not fit, or the token exists.
        """
        return attach_embedding(self.text, path, token)

    def _merged(self) -> Loras:
        if self._loras is None:
            self._loras = Loras(self.unet, self.text)
        return self._loras

    @property
    def device(self) -> torch.device:
        """Where the U-Net runs."""
        return self._device if self._offload else next(self.unet.parameters()).device

    def __call__(self, prompt: str | Sequence[str], *, count: int = 1, **settings: Any) -> list[Image.Image]:
        """`count` pictures of each prompt, one prompt after the other; keywords are those of `Settings`.

        Raises ValueError for a keyword or a value that `Settings` does not have.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        try:
            chosen = Settings(**settings)
        except TypeError as error:
            allowed = sorted(Settings.__dataclass_fields__)
            raise ValueError(f"{sorted(set(settings) - set(allowed))}: unknown; allowed are {allowed}") from error
        repeated = [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(count)]
        return to_pil(self.sample(repeated, settings=chosen))

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
                images = self.decode(self.latents(batch, settings, rng, step, wrap=wrap), settings)
            rows = [row for row, place in enumerate(places) if only is None or place in only]
            yield [places[row] for row in rows], images[rows]

    def batches(self, prompts: Sequence[str], settings: Settings) -> list[list[int]]:
        """Places in `prompts` that are drawn together: in their order, long prompts only with others as long.

        Empty chunks of text would change a picture, and what it is may not depend on its neighbours.
        """
        groups: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(self._chunks([prompt], settings), []).append(i)
        size = settings.batch
        return [places[k : k + size] for places in groups.values() for k in range(0, len(places), size)]

    def check(self, prompts: Sequence[str], settings: Settings) -> None:
        """Warn of what may not be drawn as it was meant: parts of prompts, what is cut off, guidance, a far size.

        Raises ValueError without a prompt, and for a size that the model or this machine's memory cannot make.
        """
        if not prompts:
            raise ValueError("expected at least one prompt, got none")
        every = list(dict.fromkeys([*prompts, settings.negative]))
        lines = notes(every, weighted=settings.weights, long=settings.long)
        cuts = [] if settings.long else too_long(self.text[0].tokenizer, every, weighted=settings.weights)
        lines += [f"prompt of {c.tokens} tokens is longer than {c.limit}; left out: {c.cut!r}" for c in cuts]
        lines += said(settings, told=self.unet.config.time_cond_proj_dim is not None)
        size, own = self.size(settings.size), self.size(None)
        check_memory(self.codec, size, settings, self.device)
        if self.unet.config.sample_size is not None and (far := far_size(size, own)):
            lines.append(far)
        for line in lines:
            warnings.warn(line, stacklevel=3)

    @torch.no_grad()
    def decode(self, latents: Tensor, settings: Settings) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], float32 on the CPU, of scaled latents; see `LatentCodec.draw`."""
        with self._used(self.codec.autoencoder), sliced(settings.queries):
            return self.codec.draw(latents, tile=settings.tile, slices=settings.slices).clamp(-1, 1).float().cpu()

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

        `wrap` changes the guided denoiser; `given` is more that the U-Net is told, such as `inpainting` gives.
        """
        shape, device = self.latent_shape(settings.size) if x is None else tuple(x.shape[1:]), self.device
        denoise = self.denoiser(settings, prompts)
        cond = self._cond(prompts, settings, prompts) | (given or {})
        plan = self._plan(settings) if times is None else Plan(times)
        x = (rng.normal("start", shape) if x is None else x) * (plan.scale if start is None else 1)
        with self._used(self.unet), sliced(settings.queries), unchanging(self.unet, settings.steps):
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

    def denoiser(self, settings: Settings, prompts: Sequence[str] = ()) -> Denoise:
        """The model's estimate of x_0 under guidance; `prompts`: what it will be asked for, where they may be long."""
        allocator.keep_freed_memory(self.device.type)
        denoise, scale = self.process.denoiser(self._net), settings.guidance
        if self.unet.config.time_cond_proj_dim is not None:
            return told_guidance(denoise, scale)
        if scale == 1 and settings.guide != "perpendicular":
            return denoise
        interval = times_of(settings.interval, self.process.schedule.last)
        negative = self._cond([settings.negative], settings, prompts)
        if settings.guide == "cfg":
            return classifier_free(denoise, negative, scale, settings.rescale, interval)
        if settings.guide == "projected":
            return projected(denoise, negative, scale, interval=interval)
        return perpendicular(denoise, self._cond([""], settings, prompts), negative, scale, interval=interval)

    def _net(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with self._autocast():
            return (self._compiled or self.unet)(x, t, cond)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _cond(self, prompts: Sequence[str], settings: Settings, together: Sequence[str]) -> Cond:
        """What the U-Net is given at every step: the text's keys and values are computed here, once.

        As many chunks as the longest of `together`, all prompts of the batch, and the negative prompt needs.
        """
        chunks = self._chunks(together, settings)
        with self._used(*self.text):
            cond = encode_prompts(self.text, prompts, weighted=settings.weights, chunks=chunks)
        cond |= self._sizes(len(prompts), settings.size, settings)
        size = 2 * len(together) * cond["text"].shape[1] * self.unet.key_value_width * 4
        if 0 < size <= KV_BYTES:  # without `together` the other half may come from elsewhere, as text
            with self._used(self.unet), self._autocast():
                cond["kv"] = self.unet.keys_values(cond.pop("text"))
        return cond

    def _chunks(self, prompts: Sequence[str], settings: Settings) -> int:
        """How many contexts the longest of the prompts and the negative one fill."""
        if not settings.long:
            return 1
        every = [*prompts, settings.negative]
        return max(count_chunks(tower.tokenizer, every, weighted=settings.weights) for tower in self.text)

    def _sizes(self, count: int, size: Size | None, told: Settings | None = None) -> Cond:
        """SDXL's time_ids (N, 6): height and width before cropping, the crop's top and left, height and width."""
        if self.unet.config.addition_embed_type != "text_time":
            return {}
        own = self.size(size)
        original, crop, target = (own, (0, 0), own) if told is None else (told.original, told.crop, told.target)
        ids = torch.tensor([[*(original or own), *crop, *(target or own)]], dtype=torch.float32, device=self.device)
        return {"time_ids": ids.expand(count, -1)}

    def _plan(self, settings: Settings) -> Plan:
        """The model's own times for DDIM, DDPM and its own sampler, and a student's: those of published pipelines."""
        schedule, sampler = self.process.schedule, settings.sampler
        if settings.spacing is not None:
            return Plan()
        if self.student is not None and sampler == self.student.sampler:
            return Plan(self.student.times(schedule, settings.steps))
        if self.own is not None and sampler == self.own.name:
            return self.own.plan(schedule, settings.steps)
        known = self.spacing if sampler in ("ddim", "ddpm") else None
        path = None if known is None else spaced(schedule, settings.steps, known, offset=self.offset)
        return Plan(path, self.end if sampler == "ddim" else None)

    def encode_text(self, prompts: Sequence[str], size: Size | None = None) -> Cond:
        """What the U-Net is given for prompts; SDXL's also for pictures of a size in pixels that are not cropped."""
        with self._used(*self.text):
            return encode_texts(self.text, prompts) | self._sizes(len(prompts), size)

    @torch.no_grad()
    def inpainting(self, images: Tensor, mask: Tensor) -> Cond:
        """What a U-Net with 9 channels is told of pictures (B, 3, H, W) in [-1, 1] and a mask (B or 1, 1, H, W).

        The mask is 1 where the picture is drawn anew; then the picture's latents with grey in the mask's place. Raises
        ValueError for a U-Net with other channels.
        """
        z = self.codec.channels
        if self.unet.config.in_channels != 2 * z + 1:
            raise ValueError(f"inpainting: needs a U-Net with {2 * z + 1} channels, got {self.unet.config.in_channels}")
        mask = (mask >= 0.5).to(images)
        with self._used(self.codec.autoencoder):
            known = self.codec.encode(images * (1 - mask))
        small = mask[..., :: self.codec.factor, :: self.codec.factor].expand(len(images), -1, -1, -1)
        return {"concat": torch.cat([small.to(known), known], dim=1)}

    def latent_shape(self, size: Size | None) -> tuple[int, int, int]:
        """(Z, h, w) for a size in pixels. Raises ValueError unless it is a multiple of 8 (or more, if a latent is)."""
        factor = self.codec.factor
        if size is None:
            side = self.unet.config.sample_size or 64
            return (self.codec.channels, side, side)
        height, width = checked_size(size, max(8, factor))
        return (self.codec.channels, height // factor, width // factor)

    def size(self, size: Size | None) -> tuple[int, int]:
        """(H, W) in pixels of a size, or of the model's own. Raises ValueError as `latent_shape` does."""
        _, h, w = self.latent_shape(size)
        return (h * self.codec.factor, w * self.codec.factor)


def _adapted(folder: Path, device: str | torch.device, precision: str, lenient: bool) -> TextToImage:
    """The base model of a fine-tuning with its adapter's files."""
    told = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
    pipeline = TextToImage.load(told["base"], device=device, precision=precision, lenient=lenient)
    for name in told["loras"]:
        pipeline.load_lora(folder / name)
    for name in told["embeddings"]:
        pipeline.load_embedding(folder / name)
    pipeline.student = students.beside(folder)
    return pipeline


__all__ = ["SAMPLERS", "Progress", "Settings", "TextToImage"]
