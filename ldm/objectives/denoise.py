"""The denoising loss with text conditioning and classifier-free-guidance dropout (DDPM; Ho & Salimans 2022)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ldm import dist
from ldm.diffusion.density import Importance, ImportanceTimes
from ldm.diffusion.likelihood import hybrid_loss
from ldm.diffusion.process import Process, offset_noise, perturb_noise
from ldm.diffusion.shape import Shape, Squared
from ldm.models.network import Network, of_averages
from ldm.models.vae.latents import LatentCodec
from ldm.objectives import partners, repeats
from ldm.objectives.align import Alignment, AlignOptions
from ldm.objectives.base import Objective, by_noise
from ldm.objectives.concat import Concat, Drop, Instruct
from ldm.objectives.inputs import EncodeText, LatentFeed
from ldm.objectives.masked import MaskOptions
from ldm.objectives.multires import pyramid_noise
from ldm.objectives.routing import RouteOptions, kept, set_span
from ldm.objectives.small import SmallOptions, can_be_small, shrunk, side_at
from ldm.rng import Rng, key
from ldm.sampling.guidance import told_scale
from ldm.types import Batch, Cond, Metrics


@dataclass(frozen=True, kw_only=True)
class DenoiseOptions:
    """`drop`: share of samples whose caption becomes the empty prompt, which guidance uses as its other half.

    `drop_each`: such a share for each text encoder, drawn on its own, where the network is told each one's text (SD3).
    `guidance`: the scale that a network with embedded guidance is told while it trains, or [low, high], between which
    each sample's is drawn evenly (FLUX.1 dev: 1.0 or 3.5).
    `offset_noise`: standard deviation of one more normal draw a channel, shared by its pixels, so that the mean
    brightness is learned too. `input_perturbation`: of the noise that the network sees beside its target (arXiv
    2301.11706). `multires_iterations`: coarser noises that are added, each `multires_discount` times the one before
    (`ldm.objectives.multires`; 6 to 10 and 0.1 to 0.3 are usual). `loss`: what an error costs (`ldm.diffusion.shape`),
    by `mask`, if any, where. `min_timestep`, `max_timestep`: training times are in [min, max) of the schedule's T
    (1000), a flow's too, counted from the picture. `bound_weight`: of the bound beside the simple loss where the
    variance is learned (improved DDPM, eq. 16). The rest act in training and leave the validation loss as it is.
    `drop_warmup`: optimizer steps over which the shares of `drop` and `drop_each` rise from 0. `contrastive`: of the
    distance to another sample's target that is taken from the loss (arXiv 2506.05350: 0.05). `assign` "optimal": noise
    goes to the nearest samples among each `assign_among` consecutive ones. `repeats`: how often each encoded sample is
    used, at times and with noises of its own. `align`: features inside of the network are drawn towards those that
    another has of the clean picture. `small`: the first steps are of averaged, small latents. `route`: of a
    transformer's tokens some are led around its middle.
    `concat`: a picture that a U-Net is told by more channels (`ldm.objectives.concat`).
    """

    drop: float = 0.1
    drop_each: tuple[float, ...] = ()
    guidance: float | tuple[float, float] | None = None
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    multires_iterations: int = 0
    multires_discount: float = 0.3
    loss: Shape = field(default_factory=Squared)
    mask: MaskOptions | None = None
    min_timestep: int = 0
    max_timestep: int | None = None
    bound_weight: float = 0.001
    drop_warmup: int = 0
    contrastive: float = 0.0
    assign: Literal["none", "optimal"] = "none"
    assign_among: int = 16
    repeats: int = 1
    align: AlignOptions | None = None
    small: SmallOptions | None = None
    route: RouteOptions | None = None
    concat: Concat | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop must be in [0, 1], got {self.drop}")
        for share in self.drop_each:
            if not 0 <= share <= 1:
                raise ValueError(f"drop_each must be in [0, 1], got {list(self.drop_each)}")
        if self.guidance is not None:
            low, high = _span(self.guidance)
            if not (math.isfinite(high) and 0 <= low <= high):
                raise ValueError(
                    f"guidance must be a scale of at least 0 or [low, high] with 0 <= low <= high, got {self.guidance}"
                )
        strengths = {
            "offset_noise": self.offset_noise,
            "input_perturbation": self.input_perturbation,
            "bound_weight": self.bound_weight,
        }
        for name, value in strengths.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be at least 0, got {value}")
        self._check_noise()
        if self.drop_warmup < 0:
            raise ValueError(f"drop_warmup must be at least 0 steps, got {self.drop_warmup}")
        if not 0 <= self.contrastive < 1:  # from 1 on the loss has no minimum
            raise ValueError(f"contrastive must be in [0, 1), got {self.contrastive}")
        if self.assign not in ("none", "optimal"):
            raise ValueError(f"assign must be 'none' or 'optimal', got {self.assign!r}")
        if self.assign_among < 2:
            raise ValueError(f"assign_among must be at least 2 samples, got {self.assign_among}")
        if not 1 <= self.repeats <= repeats.MOST:
            raise ValueError(f"repeats must be in [1, {repeats.MOST}], got {self.repeats}")
        if isinstance(self.concat, Instruct) and self.drop + self.concat.drop + self.concat.both > 1:
            shares = f"{self.drop}, concat.drop {self.concat.drop} and concat.both {self.concat.both}"
            raise ValueError(f"drop {shares} must not be more than 1 together")
        if self.concat is not None and self.small is not None:
            raise ValueError("small: pictures that are concatenated are not averaged; write null")
        if self.repeats > 1 and self.align is not None:
            raise ValueError(f"repeats: {self.repeats} with align: features are those of one use a picture; write 1")

    def _check_noise(self) -> None:
        """Raise ValueError for coarser noises, times and masks that cannot be."""
        if not 0 <= self.multires_iterations <= 16:
            raise ValueError(f"multires_iterations must be in [0, 16], got {self.multires_iterations}")
        if not (math.isfinite(self.multires_discount) and 0 <= self.multires_discount <= 1):
            raise ValueError(f"multires_discount must be in [0, 1], got {self.multires_discount}")
        if self.min_timestep < 0:
            raise ValueError(f"min_timestep must be at least 0, got {self.min_timestep}")
        if self.max_timestep is not None and self.max_timestep <= self.min_timestep:
            raise ValueError(
                f"max_timestep must be above min_timestep {self.min_timestep}, or null (all), got {self.max_timestep}"
            )
        if self.mask is not None and getattr(self.concat, "outside", 1) != 1:
            raise ValueError("mask: beside concat.outside, which weighs places too; write one of them")

    def span(self, steps: int) -> tuple[float, float] | None:
        """The training times [low, high) of a schedule of so many, None for all. Raises ValueError beyond it."""
        high = steps if self.max_timestep is None else self.max_timestep
        if high > steps:
            raise ValueError(f"options.max_timestep: {high} is beyond the schedule's {steps}")
        if self.min_timestep >= high:
            raise ValueError(f"options.min_timestep: {self.min_timestep} must be below the schedule's {steps}")
        return None if (self.min_timestep, high) == (0, steps) else (self.min_timestep, high)

    def check(self, micro: int) -> None:
        """Raise ValueError where micro-batches of so many samples do not divide into the pairs or groups of levers."""
        partners.check(micro, self.contrastive, self.assign_among if self.assign == "optimal" else 0)


class DenoiseObjective(Objective):
    """Weighted error of the network's answer on noised latents; with learned variance also the variational bound.

    The batch is cached moments and text, or pixels and captions; `time` (B,) in it, shares of T, are times that are not
    drawn. VAE and text towers are frozen and stay outside `trained`, unless `live`: then `encode_text` gives states
    with gradients.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        codec: LatentCodec,
        encode_text: EncodeText,
        options: DenoiseOptions,
        *,
        live: bool = False,
        below: nn.Module | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        """`below`: the network that `network`, an adapter around it, corrects or feeds; `alignment` trains too."""
        super().__init__(network)
        if options.align is not None and alignment is None:
            raise ValueError("options.align: is for a network that trains as a whole (text_to_image); write null")
        self.alignment = alignment
        self._step = 0
        self._of = (network if below is None else below,)  # in a tuple: not registered, it trains as `trained` alone
        self.process, self.options = process, options
        self._codec = codec
        drop = options.drop + (0.0 if options.concat is None else options.concat.both)
        self._feed = LatentFeed(codec, encode_text, drop, each=options.drop_each, live=live)
        if options.guidance is not None and getattr(self._of[0], "guidance_width", None) is None:
            raise ValueError(f"guidance {options.guidance}: the network is told no guidance scale; write null")
        if process.variance == "learned" and getattr(options.concat, "outside", 1) != 1:
            raise ValueError("options.concat.outside: has no meaning with process.variance 'learned'; write 1")
        if options.contrastive and process.variance == "learned":
            raise ValueError(
                f"options.contrastive: {options.contrastive} has no meaning with process.variance 'learned'; write 0"
            )
        self._span = self._checked(process, options)
        self._dropping = 0.0 if options.drop_warmup else 1.0  # part of the shares of dropped texts
        if options.small is not None:
            can_be_small(cast("Network", self._of[0]))
        if options.route is not None:
            set_span(self._of[0], options.route, None if alignment is None else alignment.place)
        density = process.density
        self._history = History(process.schedule.steps, density) if isinstance(density, Importance) else None

    @staticmethod
    def _checked(process: Process, options: DenoiseOptions) -> tuple[float, float] | None:
        """The range of training times. Raises ValueError for what a process cannot have."""
        learned = process.variance == "learned"
        if learned and (options.mask is not None or not isinstance(options.loss, Squared)):
            key = "mask" if options.mask is not None else "loss"
            raise ValueError(f"options.{key}: has no meaning with process.variance 'learned'; leave it out")
        span = options.span(process.schedule.steps)
        if span is not None and isinstance(process.density, Importance):
            raise ValueError("options.min_timestep, max_timestep: density importance draws all times; leave them out")
        return span

    def forward(self, batch: Batch, rng: Rng) -> tuple[Tensor, Metrics]:
        """Mean over the micro-batch of weight x error; randomness belongs to each sample's global position."""
        torch.manual_seed(key(rng.seed, rng.positions[0], "dropout"))  # torch's dropout takes no generator
        latents = self.latents(batch, rng)
        cond, weights = self.cond(batch, rng), batch["weight"]
        count, side = 1, 1
        if torch.is_grad_enabled():
            count, side = self.options.repeats, side_at(self.options.small, self._step)
            if not latents.is_meta:
                self.options.check(len(rng))
            rng, weights = repeats.rng_of(rng, count), repeats.rows_of(weights, count)
            latents, cond = repeats.rows_of(latents, count), repeats.cond_of(cond, count)
        if self.options.small is not None and side > 1:
            latents, cond = shrunk(self.options.small, latents, cond)
        if "time" in batch:  # validation at fixed times
            t, importance = self.process.fixed_times(batch["time"]), None
        else:
            t, importance = self._times(repeats.stratified(rng.uniform("time"), count), self._tokens(latents))
        t = t.to(latents.device)
        noise, added = self._noises(rng, latents)
        noised = self.process.add_noise(latents, added, t)
        # faster in half precision, slower in float32 (docs/log.md)
        if not noised.is_meta and torch.is_autocast_enabled(noised.device.type):
            noised = noised.contiguous(memory_format=torch.channels_last)
        if self.options.route is not None and torch.is_grad_enabled():
            cond = self._routed(cond, rng, noised)
        region = self._region(batch, latents, count)
        out, similarity = self._answer(noised, t, cond, batch, side)
        if self.process.variance == "learned":
            weight = self.options.bound_weight
            losses = hybrid_loss(self.process, out, latents, noise, t, weight=weight, added=added)
        else:
            losses = self._cost(out, latents, noise, t, region)
        if self._history is not None and torch.is_grad_enabled():
            self._history.see(rng.positions, t, losses)
        metrics = by_noise(losses.detach(), t / self.process.schedule.last)
        if self.options.contrastive and torch.is_grad_enabled():
            apart = self._cost(out, partners.swapped(latents), partners.swapped(noise), t, region)
            losses = losses - self.options.contrastive * apart
            metrics["loss_contrastive"] = apart.detach().mean()
        weights = weights.to(losses)
        if importance is not None:
            weights = weights * importance.to(losses)
        loss = (losses * weights).mean()
        if self.options.align is None or self.alignment is None or not torch.is_grad_enabled():
            return loss, metrics
        if similarity is None:
            return loss + self.alignment.nothing(), metrics
        # 1 - similarity: with a loss above 0 switching it off is no jump up, which guards would take for a spike
        term = ((1 - similarity) * batch["weight"].to(similarity)).mean()
        return loss + self.options.align.weight * term, metrics | {"alignment": similarity.detach().mean()}

    def _region(self, batch: Batch, latents: Tensor, count: int) -> Tensor | None:
        """The weights (B, 1, h, w) of latent pixels in the loss, None where all are alike."""
        if self.options.mask is not None:
            if latents.is_meta:  # a plan, whose count it does not change
                return None
            return repeats.rows_of(self.options.mask.region(batch, latents), count)
        region = None if self.options.concat is None else self.options.concat.region(batch, self._codec)
        return None if region is None else repeats.rows_of(region.to(latents), count)

    def _cost(self, out: Tensor, x0: Tensor, noise: Tensor, t: Tensor, region: Tensor | None) -> Tensor:
        """The weighted error (B,)."""
        mask = self.options.mask
        whole = mask is not None and not mask.normalize
        return self.process.loss(out, x0, noise, t, region, shape=self.options.loss, whole_area=whole)

    def _answer(self, noised: Tensor, t: Tensor, cond: Cond, batch: Batch, side: int) -> tuple[Tensor, Tensor | None]:
        """The network's answer, and the similarity (B,) of its features to the clean picture's where they align."""
        with contextlib.ExitStack() as stack:
            if side > 1:
                stack.enter_context(of_averages(cast("Network", self._of[0]), side))
            tap = None if self.alignment is None else stack.enter_context(self.alignment.watching(self._step))
            out = self.trained(noised, t, cond)
        size = (noised.shape[2], noised.shape[3])
        return out, None if self.alignment is None else self.alignment(tap, batch, size)

    def _tokens(self, latents: Tensor) -> int:
        """The image tokens of latents (B, C, H, W), each of `token_side` x `token_side` of them (2 as networks go)."""
        side = getattr(self._of[0], "token_side", 2)
        return max(1, (latents.shape[2] // side) * (latents.shape[3] // side))

    def _routed(self, cond: Cond, rng: Rng, noised: Tensor) -> Cond:
        """With the tokens that stay in the span of blocks."""
        assert self.options.route is not None
        stay = kept(self.options.route, rng, self._tokens(noised), self._step)
        return cond if stay is None else {**cond, "route": stay.to(noised.device)}

    def _times(self, u: Tensor, tokens: int) -> tuple[Tensor, Tensor | None]:
        """Times (B,), and the weights that undo their density; validation sees all times evenly."""
        if self._history is None:
            return self.process.times(u, tokens, self._span if torch.is_grad_enabled() else None), None
        return self._history.times.sample(u) if torch.is_grad_enabled() else (self.process.schedule.sample(u), None)

    def _noises(self, rng: Rng, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(the target's noise, the noise in the input)."""
        options = self.options
        noise = rng.normal("noise", latents.shape[1:]).to(latents)
        if options.offset_noise:
            noise = offset_noise(noise, rng.normal("offset", latents.shape[1:2]).to(latents), options.offset_noise)
        if options.multires_iterations and not noise.is_meta:
            noise = pyramid_noise(noise, rng, options.multires_iterations, options.multires_discount)
        if options.assign == "optimal" and torch.is_grad_enabled():
            noise = noise[partners.assigned(latents, noise, options.assign_among)]
        if not options.input_perturbation:
            return noise, noise
        extra = rng.normal("perturbation", latents.shape[1:]).to(latents)
        return noise, perturb_noise(noise, extra, options.input_perturbation)

    def noised(self, batch: Batch, rng: Rng) -> tuple[Tensor, Tensor]:
        """What the network is shown of a batch, and the times (B,), as `forward` draws both where no lever is on."""
        latents = self.latents(batch, rng)
        t = self._times(rng.uniform("time"), self._tokens(latents))[0].to(latents.device)
        return self.process.add_noise(latents, self._noises(rng, latents)[1], t), t

    def after_step(self, step: int) -> None:
        self._step = step
        if self.options.drop_warmup:
            self._dropping = min(1.0, step / self.options.drop_warmup)
        if self._history is not None:
            self._history.settle()

    def state(self) -> dict[str, Any]:
        return {} if self._history is None else {"tensors": self._history.times.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        if self._history is not None:
            self._history.load(state.get("tensors", {}))

    def latents(self, batch: Batch, rng: Rng) -> Tensor:
        """Scaled latents (B, Z, h, w), a draw from the posterior."""
        return self._feed.latents(batch, rng, self.device)

    def cond(self, batch: Batch, rng: Rng) -> Cond:
        """Text states, with the dropped ones replaced by those of the empty prompt, and the guidance that is told."""
        part = self._dropping if torch.is_grad_enabled() else 1.0
        cond = self._feed.cond(batch, rng, self.device, part)
        if self.options.concat is not None:
            with torch.no_grad():
                drop = Drop(self.options.drop, part)
                cond |= self.options.concat.cond(batch, rng, self._codec, self.device, drop)
        if self.options.guidance is None:
            return cond
        low, high = _span(self.options.guidance)
        scale = low + (high - low) * rng.uniform("guidance")
        told = told_scale(scale, getattr(self._of[0], "guidance_is_scale", False))
        return {**cond, "guidance": told.to(self.device)}


def _span(guidance: float | tuple[float, float]) -> tuple[float, float]:
    """(low, high) of what is told."""
    return guidance if isinstance(guidance, tuple) else (guidance, guidance)


class History:
    """The losses that importance-sampled times follow; the same on all ranks, whatever their number.

    A step's losses, of all ranks and micro-batches, enter after it in the order of their samples' positions, so that
    within a step all samples are drawn from one density.
    """

    def __init__(self, steps: int, density: Importance) -> None:
        self.times = ImportanceTimes(steps, density.history, density.floor)
        self._seen: list[Tensor] = []

    def see(self, positions: Sequence[int], t: Tensor, losses: Tensor) -> None:
        """Remember a micro-batch until the step is done."""
        where = torch.tensor(positions, dtype=torch.float64)
        self._seen.append(torch.stack([where, t.double().cpu(), losses.detach().double().cpu()], 1))

    def settle(self) -> None:
        """Enter the step's losses; collective where there were any. Those that are not finite are left out."""
        if not self._seen:
            return
        rows = dist.gather(torch.cat(self._seen).to(dist.device())).cpu()
        self._seen = []
        rows = rows[rows[:, 0].argsort(stable=True)]
        rows = rows[rows[:, 2].isfinite()]
        self.times.update(rows[:, 1].long(), rows[:, 2])

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from a checkpoint; from one that had no history, with an empty one."""
        self._seen = []
        if tensors:
            self.times.load_state(tensors)
