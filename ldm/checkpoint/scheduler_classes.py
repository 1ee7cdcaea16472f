"""diffusers' scheduler classes: which of them describe a process that is known here, and how each draws by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from ldm.diffusion.schedule import Flow, Schedule
from ldm.sampling.flow_times import FLOW_GRIDS, Spread, flow_times
from ldm.sampling.run import Clip, clamp, dynamic_threshold
from ldm.sampling.times import between, check_times, noise_ratio, subset
from ldm.sampling.times import times as spaced

Settings = Mapping[str, Any]
FlowGrid = Literal["flow", "flow_open"]
"""Which sigmas a published pipeline asks of a FlowMatch scheduler: its own (SD3) or 1 ... 1/N (FLUX, Z-Image)."""
_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_LDM_BETAS = _BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
_GRIDS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_BOUND = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_FLOWS = {"use_flow_sigmas": False, "flow_shift": 1.0}
_SHIFTS = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
# Pipelines take these where a config leaves them out, also with solvers whose own config does not know them.
_SHIFTS |= {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
_ZERO = {"rescale_betas_zero_snr": False}
_LEADING, _LINSPACE = {"timestep_spacing": "leading"}, {"timestep_spacing": "linspace"}
_DDIM = {**_BETAS, **_CLIP, **_BOUND, **_ZERO, **_LEADING, "set_alpha_to_one": True}
_DDPM = {**_BETAS, **_CLIP, **_BOUND, **_ZERO, **_LEADING, "variance_type": "fixed_small"}
_SIGMAS = {**_BETAS, **_LINSPACE}
_SOLVER = {**_BETAS, **_BOUND, **_GRIDS, **_FLOWS, **_SHIFTS, "solver_order": 2, "lower_order_final": True}
_DPM = {**_SOLVER, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lambda_min_clipped": -math.inf}
_DPM |= {"variance_type": None, "final_sigmas_type": "zero"}
_STUDENT = {**_LDM_BETAS, **_BOUND, **_ZERO, **_LEADING, **_CLIP, "clip_sample": False, "set_alpha_to_one": True}
_STUDENT |= {"beta_schedule": "scaled_linear", "original_inference_steps": 50, "timestep_scaling": 10.0}
_FLOW = {"num_train_timesteps": 1000, "shift": 1.0}
_FLOW_EULER = {**_FLOW, **_GRIDS, **_SHIFTS, "invert_sigmas": False, "shift_terminal": None}

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DEISMultistepScheduler": {**_SOLVER, **_LINSPACE, "algorithm_type": "deis", "solver_type": "logrho"},
    "DPMSolverMultistepScheduler": {
        **_DPM, **_LINSPACE, **_ZERO, "euler_at_final": False, "use_lu_lambdas": False,
    },
    "DPMSolverSDEScheduler": {**_LDM_BETAS, **_LINSPACE, **_GRIDS, "noise_sampler_seed": None},
    "DPMSolverSinglestepScheduler": {**_DPM, "lower_order_final": False},
    "EulerAncestralDiscreteScheduler": {**_SIGMAS, **_ZERO},
    "EulerDiscreteScheduler": {
        **_SIGMAS, **_ZERO, **_GRIDS, "interpolation_type": "linear", "timestep_type": "discrete",
        "sigma_min": None, "sigma_max": None, "final_sigmas_type": "zero",
    },
    "FlowMatchEulerDiscreteScheduler": {**_FLOW_EULER, "stochastic_sampling": False},
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "FlowMatchLCMScheduler": {**_FLOW_EULER, "scale_factors": None, "upscale_mode": "bicubic"},
    "HeunDiscreteScheduler": {**_LDM_BETAS, **_LINSPACE, **_GRIDS, **_CLIP, "clip_sample": False},
    "KDPM2AncestralDiscreteScheduler": {**_LDM_BETAS, **_LINSPACE, **_GRIDS},
    "KDPM2DiscreteScheduler": {**_LDM_BETAS, **_LINSPACE, **_GRIDS},
    "LCMScheduler": _STUDENT,
    "LMSDiscreteScheduler": {**_SIGMAS, **_GRIDS},
    "PNDMScheduler": {**_BETAS, **_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    "SASolverScheduler": {
        **_BETAS, **_BOUND, **_GRIDS, **_FLOWS, **_LINSPACE, "lambda_min_clipped": -math.inf, "variance_type": None,
    },
    "TCDScheduler": _STUDENT,
    "UniPCMultistepScheduler": {
        **_SOLVER, **_LINSPACE, **_ZERO, "solver_type": "bh2", "predict_x0": True, "disable_corrector": (),
        "solver_p": None, "final_sigmas_type": "zero", "sigma_min": None, "sigma_max": None, "shift_terminal": None,
    },
}  # fmt: skip
"""The classes whose process is known here, with what diffusers takes for keys that are absent."""
UNLIKE = {
    "EDM": "sigmas are continuous (EDM), its network is preconditioned by sigma_data",
    "CMStochasticIterative": "a consistency model in continuous sigmas",
    "ConsistencyDecoder": "a decoder's own schedule",
    "CosineDPMSolver": "sigmas are continuous (EDM) in log space",
    "KarrasVe": "variance explodes in continuous sigmas",
    "ScoreSde": "continuous time of a score SDE",
    "IPNDM": "its own schedule of angles",
    "CogVideoX": "its signal-to-noise ratio is shifted",
    "UnCLIP": "unCLIP's variance",
    "DDIMInverse": "it adds noise instead of drawing",
    "DPMSolverMultistepInverse": "it adds noise instead of drawing",
    "VQDiffusion": "tokens, not noise",
    "Amused": "tokens, not noise",
    "SCM": "trigonometric flow",
}
"""Beginnings of the names of classes that describe another process, and what that is."""


class Plan(NamedTuple):
    """What a sampler is told: the times it visits, where it ends, the bound of x_0, the scale of the first noise.

    None is the sampler's own.
    """

    times: Sequence[float] | None = None
    end: Literal["data", "first"] | None = None
    clip: Clip | None = None
    scale: float = 1.0
    whole: bool = False
    """The network is told times without their fraction, as diffusers' solvers on flow sigmas tell it (`run.whole`)."""


@dataclass(frozen=True, kw_only=True)
class OwnSampler:
    """How a folder's scheduler draws by itself: a sampler, the times it visits, where it ends, the bound of x_0.

    `grid` is a spacing of `ldm.sampling.times`, "leading_open" (DPM-Solver's: steps + 1 multiples without the 0),
    "subset" (of a solver of `original` steps) or one of `ldm.sampling.flow_times`. `between`: "karras" and
    "exponential" reach from the first to the last time of this spacing; `spread`: the same of a flow's sigmas.
    `exploding`: it starts at the noise alone of the first time, without the variance of the data.
    """

    name: str
    grid: str
    offset: int = 0
    original: int = 50
    between: str | None = None
    spread: Spread | None = None
    end: Literal["data", "first"] = "data"
    clip: Clip | None = None
    exploding: bool = False

    def times(self, schedule: Schedule, steps: int) -> list[float]:
        """`steps` decreasing times. Raises ValueError for more steps than the schedule has."""
        if self.grid == "subset":
            return subset(schedule, steps, self.original)
        if self.between is not None:
            ends = spaced(schedule, steps, self.between, offset=self.offset)
            levels = between(noise_ratio(schedule, ends[0]), noise_ratio(schedule, ends[-1]), steps, self.grid)
            return check_times(schedule, [ends[0], *(schedule.time(-math.log(r)) for r in levels[1:])])
        if isinstance(schedule, Flow) and self.grid in FLOW_GRIDS:
            return flow_times(schedule, steps, self.grid, self.spread)
        if self.grid != "leading_open":
            return spaced(schedule, steps, self.grid, offset=self.offset)
        stride = schedule.steps // (steps + 1)
        offset = min(self.offset, schedule.steps - 1 - steps * stride)
        return check_times(schedule, [float(i * stride + offset) for i in range(steps, 0, -1)])

    def plan(self, schedule: Schedule, steps: int) -> Plan:
        """For a number of steps."""
        path = self.times(schedule, steps)
        scale = schedule.at(path[0])[1] if self.exploding else 1.0
        return Plan(path, self.end, self.clip, scale, whole=self.grid in ("flow_dpm", "flow_unipc"))


def resolved(config: Settings) -> dict[str, Any]:
    """The settings of the config's class, DDIM's without one: as given, and diffusers' defaults for absent or null.

    Keys that only other classes know have no part in them. Raises ValueError for a class whose process is not known.
    """
    cls = config.get("_class_name") or "DDIMScheduler"
    if cls not in DEFAULTS:
        about = [text for start, text in UNLIKE.items() if str(cls).startswith(start)]
        why = f" ({about[0]})" if about else ""
        raise ValueError(f"scheduler: _class_name {cls!r}{why} is not one of {sorted(DEFAULTS)}")
    return {"_class_name": cls} | given(config, DEFAULTS[cls])


def given(config: Settings, defaults: Settings) -> dict[str, Any]:
    """The config's values for the keys of `defaults`; null, and what diffusers marks as left out, is the default."""
    left_out = config.get("_use_default_values") or ()
    found = {k: v for k, v in config.items() if k in defaults and k not in left_out and v is not None}
    return {**defaults, **found}


def own_sampler(settings: Settings, grid: FlowGrid = "flow") -> OwnSampler:
    """Of `resolved` settings; `grid`: whose sigmas a published pipeline gives FlowMatch schedulers.

    Raises ValueError naming the class and the setting that no sampler here follows.
    """
    cls = settings["_class_name"]
    if cls in FLOW_CLASSES:
        return _flow(settings, grid)
    if cls not in _OWN:
        raise _unlike(cls, "is no sampler here")
    if settings.get("use_beta_sigmas"):
        raise _unlike(cls, "use_beta_sigmas is not followed")
    own = _OWN[cls](settings)
    return _on_flow(settings, own) if settings.get("use_flow_sigmas") else own


def _on_flow(s: Settings, own: OwnSampler) -> OwnSampler:
    """A solver of diffusion on flow sigmas: its times, whatever `timestep_spacing` is, end in the data."""
    cls = s["_class_name"]
    for key in ("use_karras_sigmas", "use_exponential_sigmas"):
        if s[key]:
            raise _unlike(cls, f"with {key} and use_flow_sigmas takes its sigmas from betas, which is not followed")
    if own.end != "data":
        raise _unlike(cls, "with use_flow_sigmas does not end in the data")
    return replace(own, grid="flow_unipc" if cls == "UniPCMultistepScheduler" else "flow_dpm", between=None)


def _unlike(cls: str, why: str) -> ValueError:
    return ValueError(f"scheduler: {cls} {why}")


def _only(s: Settings, **allowed: Any) -> None:
    """Raise ValueError for a setting outside what is followed: one value, or a tuple of them."""
    for key, values in allowed.items():
        values = values if isinstance(values, tuple) else (values,)
        if s[key] not in values and not (isinstance(s[key], (list, tuple)) and not s[key] and () in values):
            one = repr(values[0]) if len(values) == 1 else f"one of {list(values)}"
            raise _unlike(s["_class_name"], f"with {key} {s[key]!r} is not followed; only {one} is")


def _bound(s: Settings) -> Clip | None:
    if s.get("thresholding"):
        return dynamic_threshold(float(s["dynamic_thresholding_ratio"]), float(s["sample_max_value"]))
    return clamp(float(s["clip_sample_range"])) if s.get("clip_sample") else None


def _end(s: Settings) -> Literal["data", "first"]:
    """Where the last step goes."""
    if "final_sigmas_type" in s:
        _only(s, final_sigmas_type=("zero", "sigma_min"))
        return "data" if s["final_sigmas_type"] == "zero" else "first"
    return "data" if s["set_alpha_to_one"] else "first"


def _ddim(s: Settings) -> OwnSampler:
    # From each time theirs steps T // steps down, which is the next time of the list for these two only.
    _only(s, timestep_spacing=("leading", "trailing"))
    return OwnSampler(name="ddim", grid=s["timestep_spacing"], offset=s["steps_offset"], end=_end(s), clip=_bound(s))


def _ddpm(s: Settings) -> OwnSampler:
    kinds = {"fixed_small": "ddpm", "fixed_small_log": "ddpm", "fixed_large": "ddpm_large"}
    kinds |= {"learned_range": "ddpm_learned"}
    _only(s, variance_type=tuple(kinds))
    name = kinds[s["variance_type"]]
    return OwnSampler(name=name, grid=s["timestep_spacing"], offset=s["steps_offset"], clip=_bound(s))


def _by_noise(s: Settings) -> str | None:
    """The grid in noise levels that is asked for, if one is."""
    if s["use_karras_sigmas"]:
        return "karras"
    return "exponential" if s["use_exponential_sigmas"] else None


def _in_sigmas(name: str, *, grids: bool = True) -> Callable[[Settings], OwnSampler]:
    """Solvers of k-diffusion's kind: even times that are not rounded, from the largest sigma."""

    def own(s: Settings) -> OwnSampler:
        if "interpolation_type" in s:
            _only(s, interpolation_type="linear", sigma_min=None, sigma_max=None)
        noise = _by_noise(s) if grids else None
        even = "even" if s["timestep_spacing"] == "linspace" else s["timestep_spacing"]
        return OwnSampler(
            name=name,
            grid=noise or even,
            between=even if noise else None,
            offset=s["steps_offset"],
            end=_end(s) if "final_sigmas_type" in s else "data",
            clip=_bound(s),
            exploding=s["timestep_spacing"] in ("linspace", "trailing"),
        )

    return own


def _open(s: Settings) -> str:
    spacing = str(s.get("timestep_spacing", "linspace"))
    return _by_noise(s) or {"linspace": "open", "leading": "leading_open"}.get(spacing, spacing)


def _dpm(s: Settings) -> OwnSampler:
    _only(s, use_lu_lambdas=False, lambda_min_clipped=(-math.inf,), algorithm_type=tuple(_MULTISTEP))
    table = _MULTISTEP[s["algorithm_type"]]
    _only(s, solver_order=tuple(table), solver_type=("midpoint", "logrho", "bh1", "bh2"))
    end, order = _end(s), s["solver_order"]
    if end == "first" and order > 1:
        _only(s, lower_order_final=False, euler_at_final=False)
    return OwnSampler(name=table[order], grid=_open(s), offset=s["steps_offset"], end=end, clip=_bound(s))


def _singlestep(s: Settings) -> OwnSampler:
    _only(s, lambda_min_clipped=(-math.inf,), algorithm_type=tuple(_SINGLESTEP))
    table = _SINGLESTEP[s["algorithm_type"]]
    _only(s, solver_order=tuple(table), use_karras_sigmas=False, use_exponential_sigmas=False)
    _only(s, solver_type="heun" if s["solver_order"] == 3 else ("midpoint", "logrho", "bh1", "bh2"))
    if _end(s) == "first":
        _only(s, lower_order_final=False)
    return OwnSampler(name=table[s["solver_order"]], grid="open", end=_end(s), clip=_bound(s))


def _deis(s: Settings) -> OwnSampler:
    _only(s, algorithm_type=("deis", "dpmsolver", "dpmsolver++"), solver_order=3, lower_order_final=False)
    _only(s, solver_type=("logrho", "midpoint", "heun", "bh1", "bh2"))
    return OwnSampler(name="deis", grid=_open(s), offset=s["steps_offset"], end="first", clip=_bound(s))


def _unipc(s: Settings) -> OwnSampler:
    names = {2: "unipc", 3: "unipc_3"}
    _only(s, solver_order=tuple(names), solver_type=("bh2", "midpoint", "heun", "logrho"), predict_x0=True)
    _only(s, lower_order_final=True, disable_corrector=((),), solver_p=None, final_sigmas_type="zero")
    _only(s, sigma_min=None, sigma_max=None)
    name = names[s["solver_order"]]
    return OwnSampler(name=name, grid=_open(s), offset=s["steps_offset"], end=_end(s), clip=_bound(s))


def _pndm(s: Settings) -> OwnSampler:
    _only(s, prediction_type="epsilon", timestep_spacing=("leading", "trailing"))  # theirs averages raw outputs
    name = "plms" if s["skip_prk_steps"] else "pndm"
    return OwnSampler(name=name, grid=s["timestep_spacing"], offset=s["steps_offset"], end=_end(s))


def _student(name: str) -> Callable[[Settings], OwnSampler]:
    """LCM and TCD: some of the times of a solver of `original_inference_steps`."""

    def own(s: Settings) -> OwnSampler:
        _only(s, clip_sample=False, thresholding=False, timestep_scaling=10.0)
        end = "data" if name == "lcm" else "first"
        return OwnSampler(name=name, grid="subset", original=s["original_inference_steps"], end=end)

    return own


def _flow(s: Settings, grid: FlowGrid) -> OwnSampler:
    """The FlowMatch classes. Heun's knows no sigmas of the pipeline, and LCM's is Euler's `stochastic_sampling`."""
    cls = s["_class_name"]
    if cls == "FlowMatchHeunDiscreteScheduler":
        return OwnSampler(name="heun", grid="flow")
    if cls == "FlowMatchLCMScheduler":
        _only(s, scale_factors=None)
    spreads: dict[str, Spread] = {
        "use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta",
    }  # fmt: skip
    asked: list[Spread] = [spread for key, spread in spreads.items() if s[key]]
    if len(asked) > 1:
        raise _unlike(cls, f"with {' and '.join(k for k in spreads if s[k])}: only one of them can be")
    name = "lcm" if cls == "FlowMatchLCMScheduler" or s["stochastic_sampling"] else "euler"
    own = "flow_once" if s["use_dynamic_shifting"] else "flow"  # only a static shift is in their table already
    return OwnSampler(name=name, grid=own if grid == "flow" else grid, spread=asked[0] if asked else None)


_MULTISTEP = {
    "dpmsolver": {1: "dpm_solver_1", 2: "dpm_solver_2m"},
    "dpmsolver++": {1: "dpm_solver_1", 2: "dpmpp_2m"},
    "deis": {1: "dpm_solver_1", 2: "dpmpp_2m"},
    "sde-dpmsolver++": {2: "dpmpp_2m_sde"},
}
_SINGLESTEP = {
    "dpmsolver": {1: "dpm_solver_1", 2: "dpm_solver_2s", 3: "dpm_solver_3s"},
    "dpmsolver++": {1: "dpm_solver_1", 2: "dpmpp_2s"},
}
FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_OWN: dict[str, Callable[[Settings], OwnSampler]] = {
    "DDIMScheduler": _ddim,
    "DDIMParallelScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    "DEISMultistepScheduler": _deis,
    "DPMSolverMultistepScheduler": _dpm,
    "DPMSolverSinglestepScheduler": _singlestep,
    "EulerAncestralDiscreteScheduler": _in_sigmas("euler_ancestral", grids=False),
    "EulerDiscreteScheduler": _in_sigmas("euler"),
    "HeunDiscreteScheduler": _in_sigmas("heun"),
    "KDPM2DiscreteScheduler": _in_sigmas("kdpm2"),
    "LCMScheduler": _student("lcm"),
    "LMSDiscreteScheduler": _in_sigmas("lms"),
    "PNDMScheduler": _pndm,
    "TCDScheduler": _student("tcd"),
    "UniPCMultistepScheduler": _unipc,
}
