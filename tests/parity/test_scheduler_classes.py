"""Every scheduler class of the installed diffusers, and every setting of each: drawn as theirs, or refused by name.

The oracle is the scheduler itself: what it makes of a random network from the same noise. "Drawn as theirs" is a result
within the bounds of `test_samplers_diffusers`; a refusal names the class or the setting.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers import schedulers as theirs

from ldm.checkpoint.scheduler_classes import DEFAULTS
from ldm.checkpoint.schedulers import SchedulerSettings, scheduler_from_diffusers
from ldm.diffusion import Discrete, Process
from ldm.sampling import sample, times

SHAPE = (2, 4, 4, 4)
CLASSES = sorted(n for n in dir(theirs) if n.endswith("Scheduler") and inspect.isclass(getattr(theirs, n)))
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NEEDED = {
    "AmusedScheduler": {"mask_token_id": 1},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
}
"""What has no default."""


def network(channels: int = 4):
    g = torch.Generator().manual_seed(3)
    mix = torch.randn(4, 4, generator=g) / 2
    shift = torch.randn(4, generator=g).view(1, 4, 1, 1)

    def net(x, t, cond):
        wave = torch.sin(torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1) / 200)
        out = torch.tanh(torch.einsum("ij,bjhw->bihw", mix, x) + wave * shift)
        return out if channels == 4 else torch.cat([out, torch.sin(3 * x)], 1)

    return net


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def noise(i):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + i))


def drawn_by_theirs(monkeypatch, scheduler, steps, net):
    module, count = importlib.import_module(type(scheduler).__module__), [0]

    def draw(*args, **kwargs):
        count[0] += 1
        return noise(count[0] - 1)

    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", draw)
    scheduler.set_timesteps(steps)
    x = start() * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(net(given, t, {}), t, x).prev_sample
    return x


def drawn_here(how: SchedulerSettings, steps: int, net):
    assert how.own is not None
    denoise = Process(schedule=how.schedule, prediction=how.prediction, variance=how.variance).denoiser(net)
    plan = how.own.plan(how.schedule, steps)
    options: dict[str, Any] = {"times": plan.times, "end": plan.end, "clip": plan.clip, "noise": noise}
    return sample(how.own.name, denoise, start() * plan.scale, {}, schedule=how.schedule, steps=steps, **options)


def compare(monkeypatch, cls: str, settings: dict[str, Any], steps: int, bound: float) -> str:
    """The refusal, or "" after a comparison."""
    scheduler = getattr(theirs, cls)(**settings)
    config = {**scheduler.config, "_class_name": cls}
    config.pop("_use_default_values", None)
    try:
        how = scheduler_from_diffusers(config)
        Process(schedule=how.schedule, prediction=how.prediction)
    except ValueError as error:
        return str(error)
    if how.own is None:
        return how.unlike
    net = network(8 if how.variance == "learned" else 4)
    want, got = drawn_by_theirs(monkeypatch, scheduler, steps, net), drawn_here(how, steps, net)
    deviation = float((got - want).abs().max() / want.abs().max())
    assert deviation < bound, f"{cls} {settings}: {deviation:.1e}"
    return ""


DRAWN = {
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "TCDScheduler", "UniPCMultistepScheduler",
}  # fmt: skip
"""With their defaults; whoever takes one out of the table above must take it out here."""


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class(monkeypatch, cls):
    try:
        getattr(theirs, cls)(**NEEDED.get(cls, {}))
    except ImportError:  # needs a package that is not there: its name alone must do
        config = {"_class_name": cls}
        if cls in DEFAULTS:
            assert cls in scheduler_from_diffusers(config).unlike
        else:
            with pytest.raises(ValueError, match=cls):
                scheduler_from_diffusers(config)
        return
    for steps in (10, 20):
        refusal = compare(monkeypatch, cls, NEEDED.get(cls, {}), steps, 2e-4)
        assert (refusal == "") == (cls in DRAWN)
        assert refusal == "" or cls in refusal


def test_our_defaults_are_theirs():
    """Keys and defaults of the classes that are read here; what newer versions add must be looked at."""
    left = {
        "SASolverScheduler": {
            "predictor_order", "corrector_order", "tau_func", "algorithm_type", "lower_order_final",
        },
        "DPMSolverSDEScheduler": set(),
    }  # fmt: skip
    for cls, ours in DEFAULTS.items():
        parameters = dict(inspect.signature(getattr(theirs, cls).__init__).parameters)
        if "args" in parameters:  # a stand-in for a package that is not there
            continue
        defaults = {k: p.default for k, p in parameters.items() if k not in ("self", "kwargs")}
        assert set(defaults) - set(ours) == left.get(cls, set()), cls
        for key in set(defaults) & set(ours):
            assert defaults[key] == ours[key] or (not defaults[key] and not ours[key]), (cls, key)


OTHER: dict[str, list[Any]] = {
    "num_train_timesteps": [500],
    "beta_start": [0.0005],
    "beta_end": [0.03],
    "beta_schedule": ["scaled_linear", "squaredcos_cap_v2"],
    "trained_betas": [[0.01] * 1000],
    "prediction_type": ["v_prediction", "sample", "flow_prediction", "trigflow"],
    "steps_offset": [1],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "use_lu_lambdas": [True],
    "use_flow_sigmas": [True],
    "use_dynamic_shifting": [True],
    "thresholding": [True],
    "clip_sample": [True, False],
    "clip_sample_range": [0.5],
    "rescale_betas_zero_snr": [True],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "set_alpha_to_one": [True, False],
    "variance_type": ["fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"],
    "solver_order": [1, 2, 3],
    "lower_order_final": [True, False],
    "algorithm_type": ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"],
    "solver_type": ["midpoint", "heun", "logrho", "bh1", "bh2"],
    "lambda_min_clipped": [-5.1],
    "final_sigmas_type": ["zero", "sigma_min"],
    "euler_at_final": [True],
    "original_inference_steps": [20, 100],
    "timestep_scaling": [5.0],
    "shift": [3.0],
    "invert_sigmas": [True],
    "shift_terminal": [0.1],
    "stochastic_sampling": [True],
    "interpolation_type": ["log_linear"],
    "timestep_type": ["continuous"],
    "sigma_min": [0.1],
    "sigma_max": [10.0],
    "skip_prk_steps": [True, False],
    "predict_x0": [False],
    "disable_corrector": [[0]],
}
# What theirs refuses itself, or breaks on with latents of four channels; the refusal of ours is not compared then.
THEIR_OWN = (NotImplementedError, ValueError, RuntimeError)


SHORT = {"KDPM2DiscreteScheduler": {"num_train_timesteps": 100}}  # theirs takes long to make with more
UNLIKE = {"DPMSolverSDEScheduler", "SASolverScheduler", "KDPM2AncestralDiscreteScheduler"}  # whatever their settings


@pytest.mark.parametrize("cls", sorted(set(DEFAULTS) - UNLIKE))
def test_every_setting_one_at_a_time(monkeypatch, cls):
    """A changed setting changes our result in the same way, or is refused by its name or its class."""
    compared = 0
    for key in inspect.signature(getattr(theirs, cls).__init__).parameters:
        # Where the grid is even in noise some of theirs round the times to whole ones; cosine's first sigma is huge.
        bound = 2e-3 if key.startswith("use_") else 1e-3
        for value in OTHER.get(key, []):
            try:
                refusal = compare(monkeypatch, cls, {**SHORT.get(cls, {}), key: value}, 10, bound)
            except THEIR_OWN:
                continue
            compared += refusal == ""
            assert refusal == "" or cls in refusal or key in refusal or "zero_terminal_snr" in refusal, refusal
    assert compared > 4 or cls not in DRAWN - {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}


V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
TRAILING = {"timestep_spacing": "trailing"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
FIRST = {"final_sigmas_type": "sigma_min", "lower_order_final": False}
KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
TOGETHER: list[tuple[str, dict[str, Any]]] = [
    ("DDPMScheduler", {**V, **TRAILING, "clip_sample": False}),
    ("EulerDiscreteScheduler", {**V, **TRAILING}),
    ("EulerAncestralDiscreteScheduler", {**V, **TRAILING}),
    ("DPMSolverMultistepScheduler", {**V, **TRAILING}),
    ("UniPCMultistepScheduler", {**V, **TRAILING}),
    ("UniPCMultistepScheduler", {**V, **LEADING}),
    ("LCMScheduler", V),
    ("TCDScheduler", V),
    ("EulerDiscreteScheduler", {**SD, **LEADING}),
    ("EulerDiscreteScheduler", {**SD, **LEADING, **KARRAS}),
    ("EulerDiscreteScheduler", {**SD, **TRAILING, **EXPONENTIAL, "prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min", "prediction_type": "v_prediction"}),
    ("EulerAncestralDiscreteScheduler", {**SD, **LEADING}),
    ("HeunDiscreteScheduler", {**SD, **TRAILING, **KARRAS}),
    ("LMSDiscreteScheduler", {**SD, **LEADING, **KARRAS}),
    ("KDPM2DiscreteScheduler", {**SD, **LEADING, **KARRAS}),
    ("DPMSolverMultistepScheduler", {**SD, **LEADING}),
    ("DPMSolverMultistepScheduler", {**SD, **LEADING, **KARRAS}),
    ("DPMSolverMultistepScheduler", {**SD, **KARRAS, "euler_at_final": True}),
    ("DPMSolverMultistepScheduler", {**SD, **KARRAS, "algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {**FIRST, "algorithm_type": "dpmsolver"}),
    (
        "DPMSolverSinglestepScheduler",
        {**FIRST, "algorithm_type": "dpmsolver", "solver_order": 3, "solver_type": "heun"},
    ),
    ("DEISMultistepScheduler", {"solver_order": 3, "lower_order_final": False, **KARRAS}),
    ("UniPCMultistepScheduler", {**SD, **KARRAS, "solver_order": 3}),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True, "steps_offset": 1}),
    ("LCMScheduler", {"original_inference_steps": 100, "set_alpha_to_one": False}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
]


@pytest.mark.parametrize(("cls", "settings"), TOGETHER, ids=[f"{i}-{c}" for i, (c, _) in enumerate(TOGETHER)])
@pytest.mark.parametrize("steps", [10, 20])
def test_settings_together(monkeypatch, cls, settings, steps):
    assert compare(monkeypatch, cls, settings, steps, 1e-3) == ""


def test_published_shapes_of_other_processes():
    """Playground v2.5, CosXL, SVD and consistency models are not read as a DDPM with linear betas."""
    for config, word in [
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, "sigma_max": 80.0}, "EDM"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_max": 120.0}, "EDM"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "sigma_max": 700.0}, "timestep_type"),
        ({"_class_name": "CMStochasticIterativeScheduler", "num_train_timesteps": 40}, "CMStochasticIterative"),
        ({"_class_name": "MyScheduler", "num_train_timesteps": 1000}, "MyScheduler"),
        ({"_class_name": "DDIMScheduler", "beta_start": "small"}, "beta_start 'small' is not a number"),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "log"}, "timestep_spacing 'log' is not one of"),
        ({"_class_name": "LCMScheduler", "timestep_scaling": 5.0}, "timestep_scaling 5.0"),
    ]:
        with pytest.raises(ValueError, match=word):
            scheduler_from_diffusers(config)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "EulerDiscreteScheduler", **SD, **LEADING, "set_alpha_to_one": False},
        {"_class_name": "DPMSolverMultistepScheduler", **SD, "timestep_spacing": "linspace", **KARRAS},
        {"_class_name": "PNDMScheduler", **SD, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
        {"_class_name": "KDPM2AncestralDiscreteScheduler", **SD, "timestep_spacing": None},
        {"_class_name": "SASolverScheduler", **SD, "prediction_type": "v_prediction"},
        {"_class_name": "DDIMScheduler", **SD, "clip_sample": None, "trained_betas": None, "my_note": "kept"},
        {**SD, "timestep_spacing": "linspace", "_use_default_values": ["timestep_spacing"]},
    ],
    ids=["euler", "dpm", "pndm", "kdpm2a", "sa", "nulls", "defaults"],
)
def test_ddim_of_any_class(config):
    """The process, and DDIM's times, are those that diffusers' DDIM makes of another class's config (#6068)."""
    want, how = diffusers.DDIMScheduler.from_config({k: v for k, v in config.items() if v is not None}), None
    how = scheduler_from_diffusers(config)
    assert isinstance(how.schedule, Discrete)
    assert torch.allclose(want.alphas_cumprod.double(), how.schedule.alpha_bar(), rtol=2e-4, atol=1e-6)
    assert (how.prediction.kind == "v") == (want.config["prediction_type"] == "v_prediction")
    assert how.last_alpha_one == want.config["set_alpha_to_one"]
    for steps in (7, 20, 50):
        want.set_timesteps(steps)
        assert times(how.schedule, steps, how.spacing, offset=how.offset) == [float(t) for t in want.timesteps]


def test_zero_snr_that_the_class_does_not_know():
    """The model was trained with it, whatever class draws; that theirs would leave it out is said."""
    how = scheduler_from_diffusers({"_class_name": "PNDMScheduler", **SD, **V})
    assert isinstance(how.schedule, Discrete)
    assert how.schedule.zero_terminal_snr
    assert how.own is None
    assert "rescale_betas_zero_snr" in how.unlike
