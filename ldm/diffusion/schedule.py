"""Noise schedules: x_t = alpha_t x_0 + sigma_t noise.

Legend: T number of training times, beta_t one-step variance, alpha_bar_t = alpha_t^2, SNR = alpha^2 / sigma^2,
lam = log(alpha / sigma) half the log-SNR (DPM-Solver's lambda). Tables are float64 and live outside every module, so
that no engine or cast can round them; results are float32 unless asked otherwise.
"""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

Betas = Literal["linear", "quadratic", "scaled_linear", "cosine", "sigmoid"]


@runtime_checkable
class Schedule(Protocol):
    """What a process and a sampler need to know of a schedule; times run from `first` (clean) to `last` (noise)."""

    @property
    def steps(self) -> int:
        """T, the number of training times."""
        ...

    @property
    def first(self) -> float: ...

    @property
    def last(self) -> float: ...

    @property
    def discrete(self) -> bool:
        """True if training times are the integers 0 .. T-1."""
        ...

    def alpha_sigma(
        self, t: Tensor, dtype: torch.dtype = torch.float32, *, check: bool = True
    ) -> tuple[Tensor, Tensor]: ...

    def at(self, t: float) -> tuple[float, float]: ...

    def time(self, lam: float) -> float: ...

    def warp(self, t: float) -> float:
        """The sampler's time for an evenly spaced one (the time shift of flows); identity elsewhere."""
        ...

    def sample(self, u: Tensor) -> Tensor: ...

    def of_tokens(self, tokens: int, steps: int | None = None) -> Schedule:
        """The schedule of a picture of so many image tokens in so many steps; itself unless it depends on them."""
        ...


@dataclass(frozen=True, kw_only=True)
class Discrete:
    """T integer times 0 .. T-1 with variance-preserving noise (DDPM, eq. 4).

    `betas`: "linear" (DDPM); "scaled_linear" = "quadratic", linear in sqrt(beta) (LDM, called "linear" there);
    "cosine" (improved DDPM, eq. 17); "sigmoid" in beta. `zero_terminal_snr` rescales by algorithm 1 of arXiv
    2305.08891 so that alpha_bar[T-1] is exactly 0. Fractional times interpolate lam linearly.
    """

    kind: Literal["discrete"] = "discrete"
    betas: Betas = "scaled_linear"
    steps: int = 1000
    """T, the number of times."""
    beta_start: float = 0.00085
    """beta at the first time; not used by "cosine"."""
    beta_end: float = 0.012
    """beta at the last time; not used by "cosine"."""
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.betas not in get_args(Betas):
            raise ValueError(f"betas must be one of {list(get_args(Betas))}, got {self.betas!r}")
        if self.steps < 1 or (self.zero_terminal_snr and self.steps < 2):
            raise ValueError(f"steps must be at least {2 if self.zero_terminal_snr else 1}, got {self.steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start and beta_end must satisfy 0 < beta_start <= beta_end < 1, "
                f"got {self.beta_start} and {self.beta_end}"
            )

    @property
    def first(self) -> float:
        return 0.0

    @property
    def last(self) -> float:
        return float(self.steps - 1)

    @property
    def discrete(self) -> bool:
        return True

    def alpha_bar(self) -> Tensor:
        """alpha_bar (T,) float64; do not write into it."""
        return _alpha_bar(self)

    def beta(self) -> Tensor:
        """One-step variances beta (T,) float64, from alpha_bar (so after any rescaling)."""
        bar = _alpha_bar(self)
        return 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])

    def alpha_sigma(
        self, t: Tensor, dtype: torch.dtype = torch.float32, *, check: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each shaped as t; t integer or fractional in [0, T-1].

        With `check`, raises ValueError for times out of range (on the CPU; elsewhere that would stall the device).
        """
        if check and t.device.type == "cpu" and t.numel() and (float(t.min()) < 0 or float(t.max()) > self.last):
            raise ValueError(f"t must lie in [0, {self.steps - 1}], got [{float(t.min())}, {float(t.max())}]")
        alpha, sigma, lam = _tables(self, t.device)
        if not t.is_floating_point():
            index = t.long()
            return alpha[index].to(dtype), sigma[index].to(dtype)
        t = t.to(alpha.dtype)
        low = t.floor().long()
        high = (low + 1).clamp(max=self.steps - 1)
        part = t - low
        between = lam[low] + part * (lam[high] - lam[low])
        # Next to an infinite lam (zero terminal SNR) interpolate the angle instead.
        angle = torch.lerp(torch.atan2(sigma[low], alpha[low]), torch.atan2(sigma[high], alpha[high]), part)
        finite = torch.isfinite(lam[high])
        a = torch.where(finite, torch.sigmoid(2 * between).sqrt(), torch.cos(angle))
        s = torch.where(finite, torch.sigmoid(-2 * between).sqrt(), torch.sin(angle))
        whole = part == 0
        return torch.where(whole, alpha[low], a).to(dtype), torch.where(whole, sigma[low], s).to(dtype)

    def at(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) of one time as Python floats."""
        alpha, sigma = self.alpha_sigma(torch.tensor([t], dtype=torch.float64), torch.float64)
        return float(alpha), float(sigma)

    def time(self, lam: float) -> float:
        """The fractional time whose half-log-SNR is lam: the inverse of `alpha_sigma`, clamped to [0, T-1]."""
        table = _lam_list(self)  # decreasing
        high = bisect.bisect_left(table, -lam, key=lambda v: -v)
        if high == 0 or high == len(table):
            return 0.0 if high == 0 else self.last
        low = high - 1
        if math.isinf(table[high]):
            top = math.atan(math.exp(-table[low]))
            return low + (math.atan(math.exp(-lam)) - top) / (math.pi / 2 - top)
        return low + (lam - table[low]) / (table[high] - table[low])

    def warp(self, t: float) -> float:
        return t

    def sample(self, u: Tensor) -> Tensor:
        """Uniform u (B,) in [0, 1) -> integer times (B,) int64."""
        return (u.double() * self.steps).long().clamp(0, self.steps - 1)

    def of_tokens(self, tokens: int, steps: int | None = None) -> Discrete:
        """Itself."""
        return self


@dataclass(frozen=True, kw_only=True)
class DynamicShift:
    """How a flow's shift grows with the number of image tokens; the names are those of diffusers' scheduler config.

    mu is linear in the tokens through (`base_image_seq_len`, `base_shift`) and (`max_image_seq_len`, `max_shift`), also
    beyond them; the shift is e^mu ("exponential", FLUX.1) or mu itself ("linear"). `mu` "flux2" is FLUX.2's own fit, of
    tokens and steps, which its scheduler config does not tell. Tokens are counted as the transformer sees them, after
    2 x 2 latent pixels were packed into one.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    """Whether the shift is e^mu ("exponential") or mu itself ("linear")."""
    mu: Literal["linear", "flux2"] = "linear"

    def __post_init__(self) -> None:
        if self.time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type must be 'exponential' or 'linear', got {self.time_shift_type!r}")
        if self.mu not in ("linear", "flux2"):
            raise ValueError(f"mu must be 'linear' or 'flux2', got {self.mu!r}")
        if not 0 < self.base_image_seq_len < self.max_image_seq_len:
            raise ValueError(
                f"base_image_seq_len and max_image_seq_len must satisfy 0 < base < max, "
                f"got {self.base_image_seq_len} and {self.max_image_seq_len}"
            )

    def exponent(self, tokens: int, steps: int | None = None) -> float:
        """mu. Raises ValueError for no tokens, and where it depends on the number of steps and that is not told."""
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        if self.mu == "flux2":
            return _flux2_mu(tokens, steps)
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return tokens * slope + (self.base_shift - slope * self.base_image_seq_len)

    def shift(self, tokens: int, steps: int | None = None) -> float:
        """The shift of so many tokens. Raises ValueError where a linear one is not above 0."""
        mu = self.exponent(tokens, steps)
        if self.time_shift_type == "exponential":
            return math.exp(mu)
        if not mu > 0:
            raise ValueError(f"the linear shift of {tokens} tokens is {mu:g}, which must be above 0")
        return mu


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Rectified flow, alpha = 1 - t/T and sigma = t/T for real t in [0, T] (arXiv 2209.03003).

    Times are scaled by T = `steps`, so that networks see the range they see with `Discrete`. `shift` moves training
    and sampling times to more noise: u -> shift u / (1 + (shift - 1) u) (arXiv 2403.03206, eq. 23). With `dynamic` the
    shift in sampling is that of a picture's number of tokens, which `of_tokens` gives, and training is not shifted
    (as diffusers' scheduler has it; density "flux_shift" shifts there). `terminal`: samplers' times are stretched to
    end at this sigma before the data (`shift_terminal`).
    """

    kind: Literal["flow"] = "flow"
    steps: int = 1000
    shift: float = 1.0
    dynamic: DynamicShift | None = None
    terminal: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not self.shift > 0:
            raise ValueError(f"shift must be above 0, got {self.shift}")
        if self.terminal is not None and not 0 < self.terminal < 1:
            raise ValueError(f"terminal must lie in (0, 1), got {self.terminal}")

    @property
    def first(self) -> float:
        return 0.0

    @property
    def last(self) -> float:
        return float(self.steps)

    @property
    def discrete(self) -> bool:
        return False

    def alpha_sigma(
        self, t: Tensor, dtype: torch.dtype = torch.float32, *, check: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each shaped as t in [0, T]."""
        if check and t.device.type == "cpu" and t.numel() and (float(t.min()) < 0 or float(t.max()) > self.last):
            raise ValueError(f"t must lie in [0, {self.steps}], got [{float(t.min())}, {float(t.max())}]")
        sigma = t.to(_wide(t.device)) / self.steps
        return (1 - sigma).to(dtype), sigma.to(dtype)

    def at(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) of one time as Python floats."""
        return 1 - t / self.steps, t / self.steps

    def time(self, lam: float) -> float:
        """The time whose log(alpha / sigma) is lam."""
        return self.steps / (1 + math.exp(lam)) if lam < 700 else 0.0

    def warp(self, t: float) -> float:
        """t, shifted. Raises ValueError for a dynamic shift without its number of tokens."""
        if self.dynamic is not None:
            raise ValueError("the flow's shift is dynamic: its times need the number of image tokens (Flow.of_tokens)")
        u = t / self.steps
        return self.steps * self.shift * u / (1 + (self.shift - 1) * u)

    def sample(self, u: Tensor) -> Tensor:
        """Uniform u (B,) in [0, 1) -> real times (B,) float32, shifted unless the shift is dynamic.

        diffusers and sd-scripts draw an index into a table of such times, counted from the noise: the same but for
        T steps instead of real times, and their u is 1 - u here (their logit_mean has the other sign).
        """
        shift = 1.0 if self.dynamic is not None else self.shift
        return self.steps * shift * u / (1 + (shift - 1) * u)

    def of_tokens(self, tokens: int, steps: int | None = None) -> Flow:
        """The flow whose shift is that of so many image tokens, after 2 x 2 packing; itself where it is not dynamic."""
        if self.dynamic is None:
            return self
        return replace(self, shift=self.dynamic.shift(tokens, steps), dynamic=None)


def _flux2_mu(tokens: int, steps: int | None) -> float:
    """FLUX.2's mu: a line in tokens for 10 steps and one for 200, and the line through both in the steps."""
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:  # its authors take the second alone there
        return many
    if steps is None:
        raise ValueError("the dynamic shift 'flux2' depends on the number of steps, which is not told")
    few = 8.73809524e-05 * tokens + 1.89833333
    slope = (many - few) / 190
    return slope * steps + (many - 200 * slope)


def rescale_zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """alpha_bar with its last entry moved to exactly 0 and its first kept (arXiv 2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def _wide(device: torch.device) -> torch.dtype:
    """float64, except where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


@functools.lru_cache(maxsize=64)
def _alpha_bar(schedule: Discrete) -> Tensor:
    start, end, count = schedule.beta_start, schedule.beta_end, schedule.steps
    if schedule.betas == "cosine":
        t = torch.arange(count + 1, dtype=torch.float64) / count
        level = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    elif schedule.betas == "linear":
        beta = torch.linspace(start, end, count, dtype=torch.float64)
    elif schedule.betas == "sigmoid":
        beta = torch.sigmoid(torch.linspace(-6, 6, count, dtype=torch.float64)) * (end - start) + start
    else:
        beta = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    bar = torch.cumprod(1 - beta, 0)
    return rescale_zero_terminal_snr(bar) if schedule.zero_terminal_snr else bar


@functools.lru_cache(maxsize=64)
def _tables(schedule: Discrete, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    bar = _alpha_bar(schedule)
    lam = 0.5 * (bar.log() - torch.log1p(-bar))
    alpha, sigma, lam = (v.to(_wide(device)).to(device) for v in (bar.sqrt(), (1 - bar).sqrt(), lam))
    return alpha, sigma, lam


@functools.lru_cache(maxsize=64)
def _lam_list(schedule: Discrete) -> list[float]:
    return _tables(schedule, torch.device("cpu"))[2].tolist()
