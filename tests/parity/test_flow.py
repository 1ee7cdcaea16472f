"""Flows as diffusers' schedulers have them: sigmas digit by digit, the samples of every class, published configs."""

from __future__ import annotations

import importlib
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from ldm.checkpoint.schedulers import SchedulerSettings, scheduler_from_diffusers, scheduler_to_diffusers
from ldm.diffusion import DynamicShift, Flow, Process, Velocity
from ldm.sampling import sample, times
from ldm.sampling.run import whole

EULER, HEUN, LCM = (f"FlowMatch{n}Scheduler" for n in ("EulerDiscrete", "HeunDiscrete", "LCM"))
SHAPE = (2, 4, 4, 4)
SD3 = {"_class_name": EULER, "_diffusers_version": "0.29.0.dev0", "num_train_timesteps": 1000, "shift": 3.0}
FLUX = {
    "_class_name": EULER, "_diffusers_version": "0.30.0.dev0", "base_image_seq_len": 256, "base_shift": 0.5,
    "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
    "use_dynamic_shifting": True,
}  # fmt: skip
SCHNELL = {**FLUX, "shift": 1.0, "use_dynamic_shifting": False}
Z_IMAGE = {"_class_name": EULER, "num_train_timesteps": 1000, "use_dynamic_shifting": False, "shift": 3.0}
MORE = {
    "invert_sigmas": False, "shift_terminal": None, "stochastic_sampling": False, "time_shift_type": "exponential",
    "use_beta_sigmas": False, "use_exponential_sigmas": False, "use_karras_sigmas": False,
}  # fmt: skip
FLUX2 = {**FLUX, **MORE}
LTX = {**FLUX2, "base_image_seq_len": 1024, "base_shift": 0.95, "max_shift": 2.05, "shift": 1.0, "shift_terminal": 0.1}
QWEN = {**FLUX2, "max_image_seq_len": 8192, "max_shift": 0.9, "shift": 1.0, "shift_terminal": 0.02}
LIGHTNING = {**QWEN, "base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
PUBLISHED = {
    "sd3": SD3, "flux-dev": FLUX, "flux-schnell": SCHNELL, "z-image": Z_IMAGE, "flux2": FLUX2, "ltx": LTX,
    "qwen": QWEN, "qwen-lightning": LIGHTNING,
}  # fmt: skip
WAN = {
    "_class_name": "UniPCMultistepScheduler", "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001,
    "disable_corrector": [], "dynamic_thresholding_ratio": 0.995, "final_sigmas_type": "zero", "flow_shift": 3.0,
    "lower_order_final": True, "num_train_timesteps": 1000, "predict_x0": True, "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False, "sample_max_value": 1.0, "solver_order": 2, "solver_p": None,
    "solver_type": "bh2", "steps_offset": 0, "thresholding": False, "time_shift_type": "exponential",
    "timestep_spacing": "linspace", "trained_betas": None, "use_beta_sigmas": False, "use_dynamic_shifting": False,
    "use_exponential_sigmas": False, "use_flow_sigmas": True, "use_karras_sigmas": False,
}  # fmt: skip
ON_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SANA = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "solver_order": 2, **ON_FLOW}


def network():
    g = torch.Generator().manual_seed(3)
    mix = torch.randn(4, 4, generator=g) / 2
    shift = torch.randn(4, generator=g).view(1, 4, 1, 1)

    def net(x, t, cond):
        wave = torch.sin(torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1) / 200)
        return torch.tanh(torch.einsum("ij,bjhw->bihw", mix, x) + wave * shift)

    return net


def noise(i):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + i))


def theirs_of(config: dict[str, Any]):
    return getattr(diffusers, config["_class_name"]).from_config(config)


def asked(config: dict[str, Any], steps: int, tokens: int, grid: str) -> dict[str, Any]:
    """What a pipeline gives `set_timesteps`: its sigmas where it has own ones, and mu where the shift is dynamic."""
    given: dict[str, Any] = {"num_inference_steps": steps}
    if grid == "flow_open":
        given["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    if config.get("use_dynamic_shifting"):
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        default = (256, 4096, 0.5, 1.15)
        given["mu"] = calculate_shift(tokens, *(config.get(k, d) for k, d in zip(names, default)))
    return given


@pytest.mark.parametrize("shift", [1.0, 1.15, 3.0, 6.0, 0.5])
@pytest.mark.parametrize("total", [1000, 500])
def test_the_double_shift_digit_by_digit(shift, total):
    """SD3's grid: the same float32 numbers for every number of steps up to 150."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift, num_train_timesteps=total)
    own = scheduler_from_diffusers({"_class_name": EULER, "shift": shift, "num_train_timesteps": total})
    assert own.own is not None
    for steps in [*range(1, 60), 100, 150]:
        scheduler.set_timesteps(steps)
        path = own.own.times(own.schedule, steps)
        assert (np.array(path) / total).astype(np.float32).tolist() == scheduler.sigmas.tolist()[:-1]


@pytest.mark.parametrize("spread", ["", "karras", "exponential", "beta"])
@pytest.mark.parametrize("grid", ["flow", "flow_open"])
@pytest.mark.parametrize("name", list(PUBLISHED))
def test_sigmas_of_published_configs(name, grid, spread):
    """With the scheduler's sigmas and the pipeline's, at several sizes and lengths; theirs round to float32."""
    config = PUBLISHED[name] | ({f"use_{spread}_sigmas": True} if spread else {})
    scheduler = theirs_of(config)
    how = scheduler_from_diffusers(config, grid=grid)
    assert how.own is not None
    assert how.prediction == Velocity()
    for steps in (1, 2, 9, 28, 50):
        if steps == 1 and config.get("shift_terminal"):
            continue  # theirs divide 0 by 0
        for tokens in (256, 1000, 4096, 9000):
            scheduler.set_timesteps(**asked(config, steps, tokens, grid))
            path = how.own.times(how.schedule.of_tokens(tokens), steps)
            assert np.array(path) / 1000 == pytest.approx(scheduler.sigmas[:-1].numpy(), abs=1e-6)


def test_the_times_of_other_samplers_are_those_of_the_pipelines():
    """A sampler that is not the scheduler's own visits FLUX's and Qwen-Image's sigmas too."""
    for config in (FLUX, QWEN):
        how = scheduler_from_diffusers(config, grid="flow_open")
        flow = how.schedule.of_tokens(4096)
        assert how.own is not None
        for spacing in ("trailing", "open", "even"):
            assert times(flow, 20, spacing) == pytest.approx(how.own.times(flow, 20), rel=1e-12)


def test_linear_dynamic_shift():
    config = {**FLUX, "time_shift_type": "linear"}
    scheduler, how = theirs_of(config), scheduler_from_diffusers(config)
    scheduler.set_timesteps(**asked(config, 20, 2000, "flow"))
    assert how.own is not None
    path = how.own.times(how.schedule.of_tokens(2000), 20)
    assert np.array(path) / 1000 == pytest.approx(scheduler.sigmas[:-1].numpy(), abs=1e-6)


def test_flux2_finds_its_shift_from_tokens_and_steps():
    how = scheduler_from_diffusers(FLUX2, grid="flow_open", mu="flux2")
    scheduler = theirs_of(FLUX2)
    assert how.own is not None
    for tokens in (256, 1024, 4096, 4301, 8000):
        for steps in (4, 28, 50):
            mu = compute_empirical_mu(tokens, steps)
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
            flow = how.schedule.of_tokens(tokens, steps)
            assert isinstance(flow, Flow)
            assert flow.shift == pytest.approx(math.exp(mu), rel=1e-12)
            path = how.own.times(flow, steps)
            assert np.array(path) / 1000 == pytest.approx(scheduler.sigmas[:-1].numpy(), abs=1e-6)
    with pytest.raises(ValueError, match="'flux2' depends on the number of steps"):
        how.schedule.of_tokens(256)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_round_trip(name):
    """Read, written, read by diffusers and by us again: the same flow, and every setting of the flow as published."""
    config = PUBLISHED[name]
    schedule = scheduler_from_diffusers(config).schedule
    written = scheduler_to_diffusers(schedule, Velocity())
    assert scheduler_from_diffusers(written).schedule == schedule
    back = theirs_of(written).config
    for key, value in theirs_of(config).config.items():
        if key not in ("_diffusers_version", "_use_default_values"):
            dynamic = key.startswith(("base_", "max_")) and not config.get("use_dynamic_shifting")
            assert dynamic or back[key] == value, key


CASES: list[tuple[dict[str, Any], str, float]] = [
    (SD3, "euler", 1e-5),
    (FLUX, "euler", 1e-5),
    ({**SD3, "stochastic_sampling": True}, "lcm", 1e-5),
    ({**FLUX, "stochastic_sampling": True}, "lcm", 1e-5),
    ({**SD3, "_class_name": HEUN}, "heun", 1e-5),
    ({**SD3, "_class_name": LCM}, "lcm", 1e-5),
    ({**FLUX, "_class_name": LCM}, "lcm", 1e-5),
    ({**LTX, "_class_name": LCM, "use_karras_sigmas": True}, "lcm", 1e-5),
    (SANA, "dpmpp_2m", 2e-4),
    ({**SANA, "solver_order": 1}, "dpm_solver_1", 2e-4),
    ({**SANA, "use_dynamic_shifting": True}, "dpmpp_2m", 2e-4),
    ({**SANA, "algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde", 2e-4),
    ({**SANA, "_class_name": "DPMSolverSinglestepScheduler"}, "dpmpp_2s", 2e-4),
    (WAN, "unipc", 2e-4),
    ({**WAN, "flow_shift": 5.0, "solver_order": 3}, "unipc_3", 2e-4),
    ({**WAN, "use_dynamic_shifting": True}, "unipc", 2e-4),
    ({**WAN, "shift_terminal": 0.05}, "unipc", 2e-4),
]


def run(how: SchedulerSettings, steps: int, tokens: int, grid: str, **options: Any) -> torch.Tensor:
    assert how.own is not None
    schedule = how.schedule.of_tokens(tokens)
    plan = how.own.plan(schedule, steps)
    net = whole(network()) if plan.whole else network()
    denoise = Process(schedule=schedule, prediction=how.prediction).denoiser(net)
    options |= {"times": plan.times, "end": plan.end, "clip": plan.clip}
    return sample(how.own.name, denoise, noise(-1), {}, schedule=schedule, steps=steps, noise=noise, **options)


@pytest.mark.parametrize("steps", [2, 10, 28])
@pytest.mark.parametrize("grid", ["flow", "flow_open"])
@pytest.mark.parametrize(("config", "name", "bound"), CASES, ids=[f"{i}-{c[1]}" for i, c in enumerate(CASES)])
def test_samples(monkeypatch, config, name, bound, grid, steps):
    """Every class with a flow mode that draws here, from the same noise; DPM's and UniPC's tables are float32 logs."""
    scheduler, how = theirs_of(config), scheduler_from_diffusers(config, grid=grid)
    assert how.own is not None, how.unlike
    assert how.own.name == name
    module, count = importlib.import_module(type(scheduler).__module__), [0]

    def draw(*args, **kwargs):
        count[0] += 1
        return noise(count[0] - 1)

    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", draw)
    given = asked(config, steps, 1500, grid)
    if "use_flow_sigmas" in config or config["_class_name"] == HEUN:
        given.pop("sigmas", None)  # as FluxPipeline leaves its sigmas out there
    scheduler.set_timesteps(**given)
    x, net = noise(-1), network()
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t, {}), t, x).prev_sample
    got = run(how, steps, 1500, grid)
    deviation = float((got - x).abs().max() / x.abs().max())
    print(f"{name}: {deviation:.1e}")
    assert deviation < bound


def test_deis_on_flow_sigmas():
    """Theirs repeats its last sigma instead of ending in the data, which is said; before that the samples are equal."""
    config = {"_class_name": "DEISMultistepScheduler", "solver_order": 3, "lower_order_final": False, **ON_FLOW}
    how = scheduler_from_diffusers(config)
    assert how.schedule == Flow(shift=3.0)
    assert how.own is None
    assert "does not end in the data" in how.unlike
    scheduler = theirs_of(config)
    scheduler.set_timesteps(20)
    x, net, path = noise(-1), network(), (scheduler.sigmas[:-1].double() * 1000).tolist()
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(net(x, t, {}), t, x).prev_sample
    found = []
    denoise = Process(schedule=how.schedule, prediction=Velocity()).denoiser(whole(net))
    options: dict[str, Any] = {"times": path, "progress": lambda i, y: found.append(y), "noise": noise}
    sample("deis", denoise, noise(-1), {}, schedule=how.schedule, steps=20, **options)
    assert float((found[-2] - x).abs().max() / x.abs().max()) < 2e-4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**SD3, "invert_sigmas": True}, "invert_sigmas True is not supported; only False is"),
        ({**FLUX, "time_shift_type": "odd"}, "time_shift_type must be 'exponential' or 'linear', got 'odd'"),
        ({**FLUX, "base_shift": "small"}, "base_shift 'small' is not a number"),
        ({**FLUX, "max_image_seq_len": 256}, "base_image_seq_len and max_image_seq_len must satisfy"),
        ({**LTX, "shift_terminal": 1.5}, r"shift_terminal must lie in \(0, 1\), got 1.5"),
        ({**SANA, "prediction_type": "epsilon"}, "supported only together"),
        ({"_class_name": "UniPCMultistepScheduler", "use_dynamic_shifting": True}, "needs use_flow_sigmas"),
    ],
)
def test_refused(config, message):
    with pytest.raises(ValueError, match=message) as caught:
        scheduler_from_diffusers(config)
    assert str(caught.value).startswith("scheduler: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**WAN, "use_karras_sigmas": True}, "use_karras_sigmas and use_flow_sigmas"),
        ({**SANA, "final_sigmas_type": "sigma_min", "lower_order_final": False}, "does not end in the data"),
        ({**SD3, "use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of them can be"),
        ({**SD3, "_class_name": LCM, "scale_factors": [0.5, 1.0]}, "scale_factors"),
    ],
)
def test_what_no_sampler_here_follows_is_said(config, message):
    how = scheduler_from_diffusers(config)
    assert how.own is None
    assert message in how.unlike
    assert how.schedule == Flow(shift=3.0)


def test_a_dynamic_flow_has_no_times_without_tokens():
    flow = Flow(shift=3.0, dynamic=DynamicShift())
    with pytest.raises(ValueError, match="its times need the number of image tokens"):
        times(flow, 4)
    assert flow.of_tokens(4096) == Flow(shift=math.exp(1.15))
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        flow.of_tokens(0)
