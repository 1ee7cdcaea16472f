"""Every sampler against diffusers' scheduler of that name, on a random network, over a grid of settings."""

from __future__ import annotations

import importlib

import diffusers
import pytest
import torch

from ldm.diffusion import PREDICTIONS, Discrete, Process
from ldm.sampling import dynamic_threshold, sample, times

SCALED = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
THEIRS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
SHAPE = (2, 4, 4, 4)
TRAILING = {"timestep_spacing": "trailing"}


def network():
    g = torch.Generator().manual_seed(3)
    mix = torch.randn(4, 4, generator=g) / 2
    shift = torch.randn(4, generator=g).view(1, 4, 1, 1)

    def net(x, t, cond):
        wave = torch.sin(torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1) / 200)
        return torch.tanh(torch.einsum("ij,bjhw->bihw", mix, x) + wave * shift)

    return net


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def noise(i):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + i))


def theirs(monkeypatch, scheduler, steps, net, quiet=None, **step_options):
    """(sample, times) of diffusers' loop, its random draws replaced by `noise`, by 0 from draw `quiet` on."""
    module = importlib.import_module(type(scheduler).__module__)
    drawn = []

    def draw(*args, **kwargs):
        drawn.append(1)
        return noise(len(drawn) - 1) * (quiet is None or len(drawn) <= quiet)

    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", draw)
    scheduler.set_timesteps(steps)
    x = start() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        x = scheduler.step(net(given, t, {}), t, x, **step_options).prev_sample
    times = list(dict.fromkeys(float(t) for t in scheduler.timesteps))
    return x, times


def ours(name, prediction, times, *, scale=1.0, schedule=None, **options):
    schedule = schedule or Discrete()
    denoise = Process(schedule=schedule, prediction=PREDICTIONS[prediction]).denoiser(network())
    return sample(
        name, denoise, start() * scale, {}, schedule=schedule, steps=len(times), noise=noise, times=times, **options
    )


def close(a, b, tolerance=2e-4):
    """Relative to the largest value: their tables are float32 sums of 1000 logarithms."""
    deviation = float((a - b).abs().max() / b.abs().max())
    print(f"deviation {deviation:.1e}")
    assert deviation < tolerance


PREDICTION = pytest.mark.parametrize("prediction", list(THEIRS))


def make(cls, prediction, **config):
    return getattr(diffusers, cls)(**{**SCALED, "prediction_type": THEIRS[prediction], **config})


# Elsewhere their step before is T // N away: see test_ddim_takes_the_next_time_of_the_list.
EVEN = [(1, "leading"), (10, "leading"), (1, "trailing"), (10, "trailing"), (13, "trailing"), (1, "linspace")]


@PREDICTION
@pytest.mark.parametrize(("steps", "spacing"), EVEN)
@pytest.mark.parametrize(("name", "variance"), [("ddpm", "fixed_small"), ("ddpm_large", "fixed_large")])
def test_ddpm(monkeypatch, name, variance, spacing, steps, prediction):
    scheduler = make("DDPMScheduler", prediction, clip_sample=False, timestep_spacing=spacing, variance_type=variance)
    monkeypatch.setattr(scheduler, "previous_timestep", lambda t: _next(scheduler, t))
    # They add noise of variance beta to the very result unless it comes from t = 0; DDPM's z is 0 there (alg. 2).
    want, times = theirs(monkeypatch, scheduler, steps, network(), quiet=steps - 1)
    close(ours(name, prediction, times), want)


@PREDICTION
@pytest.mark.parametrize(("steps", "spacing"), EVEN)
def test_ddpm_learned(monkeypatch, spacing, steps, prediction):
    """A network of 2C channels; theirs interpolates beta and beta_tilde by the same fraction."""
    config = {"clip_sample": False, "timestep_spacing": spacing, "variance_type": "learned_range"}
    scheduler = make("DDPMScheduler", prediction, **config)
    monkeypatch.setattr(scheduler, "previous_timestep", lambda t: _next(scheduler, t))
    mean = network()

    def net(x, t, cond):
        return torch.cat([mean(x, t, cond), torch.sin(3 * x)], 1)

    want, times = theirs(monkeypatch, scheduler, steps, net, quiet=steps - 1)
    denoise = Process(prediction=PREDICTIONS[prediction], variance="learned").denoiser(net)
    options = {"schedule": Discrete(), "steps": steps, "noise": noise, "times": times}
    close(sample("ddpm_learned", denoise, start(), {}, **options), want)


def _next(scheduler, t):
    later = [int(v) for v in scheduler.timesteps if v < t]
    return later[0] if later else -1


@PREDICTION
@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(monkeypatch, eta, one, spacing, steps, prediction):
    scheduler = make("DDIMScheduler", prediction, clip_sample=False, timestep_spacing=spacing, set_alpha_to_one=one)
    want, times = theirs(monkeypatch, scheduler, steps, network(), eta=eta)
    close(ours("ddim", prediction, times, eta=eta, end="data" if one else "first"), want)


FULL = [
    ("ddpm", "DDPMScheduler", {"clip_sample": False}, "epsilon"),
    ("ddpm_large", "DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}, "v"),
    ("ddim", "DDIMScheduler", {"clip_sample": False}, "v"),
    ("euler", "EulerDiscreteScheduler", {}, "epsilon"),
    ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}, "epsilon"),
    ("heun", "HeunDiscreteScheduler", {}, "epsilon"),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {}, "epsilon"),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "v"),
    ("unipc", "UniPCMultistepScheduler", {}, "epsilon"),
]


@pytest.mark.parametrize(("name", "cls", "config", "prediction"), FULL, ids=[row[0] for row in FULL])
def test_every_time(monkeypatch, name, cls, config, prediction):
    """T steps of T, the whole process; float32 tables and a thousand steps of rounding on their side."""
    scheduler = make(cls, prediction, **TRAILING, **config)
    quiet = 999 if cls == "DDPMScheduler" else None
    want, times = theirs(monkeypatch, scheduler, 1000, network(), quiet=quiet)
    assert times == [float(t) for t in reversed(range(1000))]
    scale = float(scheduler.init_noise_sigma)
    scale *= Discrete().at(999)[0] if scale > 1 else 1
    close(ours(name, prediction, times, scale=scale), want, 1e-3)


BETAS = [
    (
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        Discrete(betas="linear", beta_start=1e-4, beta_end=0.02),
    ),
    ({"beta_schedule": "squaredcos_cap_v2"}, Discrete(betas="cosine")),
    ({"num_train_timesteps": 250}, Discrete(steps=250)),
]


@PREDICTION
@pytest.mark.parametrize("steps", [7, 30])
@pytest.mark.parametrize(("theirs_config", "schedule"), BETAS, ids=["linear", "cosine", "T250"])
@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("euler", "EulerDiscreteScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("tcd", "TCDScheduler"),
        ("lcm", "LCMScheduler"),
    ],
)
def test_other_schedules(monkeypatch, name, cls, theirs_config, schedule, steps, prediction):
    """Other betas and another T, with steps that do not divide it."""
    config = {"algorithm_type": "sde-dpmsolver++"} if name == "dpmpp_2m_sde" else {}
    config |= {} if name in ("lcm", "tcd") else TRAILING
    scheduler = make(cls, prediction, **{**theirs_config, **config})
    want, times = theirs(monkeypatch, scheduler, steps, network())
    scale = float(scheduler.init_noise_sigma)
    scale *= schedule.at(times[0])[0] if scale > 1 else 1
    close(ours(name, prediction, times, schedule=schedule, scale=scale), want, 1e-3)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize(("name", "cls"), [("euler", "EulerDiscreteScheduler"), ("heun", "HeunDiscreteScheduler")])
def test_times_by_noise_level(monkeypatch, name, cls, spacing, steps):
    """Karras' and exponential times fall between training times; the network is asked at the same fractions."""
    scheduler = make(cls, "epsilon", **{f"use_{spacing}_sigmas": True})
    want, path = theirs(monkeypatch, scheduler, steps, network())
    found = times(Discrete(), steps, spacing)
    assert found == pytest.approx(path, abs=0.05)
    close(ours(name, "epsilon", found, scale=float(scheduler.init_noise_sigma) * Discrete().at(999)[0]), want, 2e-3)


@PREDICTION
@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize(("name", "cls"), [("ddpm", "DDPMScheduler"), ("ddim", "DDIMScheduler")])
def test_thresholds(monkeypatch, name, cls, steps, prediction):
    """Clipping to [-1, 1], and to a quantile; both only of the estimate of x_0."""
    for config, clip in (
        ({"clip_sample": True}, 1.0),
        ({"clip_sample": False, "thresholding": True, "sample_max_value": 1.5}, dynamic_threshold(0.995, 1.5)),
    ):
        scheduler = make(cls, prediction, **TRAILING, **config)
        if cls == "DDPMScheduler":
            want, path = theirs(monkeypatch, scheduler, steps, network(), quiet=steps - 1)
        else:
            want, path = theirs(monkeypatch, scheduler, steps, network())
        close(ours(name, prediction, path, clip=clip), want)


def test_ddim_takes_the_next_time_of_the_list(monkeypatch):
    """Where steps do not divide T, theirs goes to t - T // N, which is not the time it is at next; ours goes there.

    Trailing 13 visits 999, 922, ...: theirs steps to 923. Ours is DDIM's eq. 12 written out.
    """
    scheduler = make("DDIMScheduler", "epsilon", clip_sample=False, timestep_spacing="trailing")
    want, path = theirs(monkeypatch, scheduler, 13, network())
    assert path == times(Discrete(), 13, "trailing")
    assert float((ours("ddim", "epsilon", path) - want).abs().max() / want.abs().max()) > 1e-3
    bar = Discrete().alpha_bar()
    signal, level = bar[int(path[0])].sqrt(), (1 - bar[int(path[0])]).sqrt()
    noise_ = network()(start(), path[0], {})
    x0 = (start() - level * noise_) / signal
    after = bar[int(path[1])]
    step = (after.sqrt() * x0 + (1 - after).sqrt() * noise_).float()
    found = []
    denoise = Process(schedule=Discrete()).denoiser(network())
    sample(
        "ddim",
        denoise,
        start(),
        {},
        schedule=Discrete(),
        steps=13,
        times=path,
        noise=noise,
        progress=lambda i, x: found.append(x),
    )
    close(found[0], step)


def test_offset_at_full_length(monkeypatch):
    """T steps with offset 1 ask theirs for time T, which does not exist; ours stays inside."""
    scheduler = make("DDIMScheduler", "epsilon", timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(1000)
    assert int(scheduler.timesteps[0]) == 1000
    assert times(Discrete(), 1000, "leading", offset=1) == [float(t) for t in reversed(range(1000))]
    scheduler.set_timesteps(10)
    assert times(Discrete(), 10, "leading", offset=1) == [float(t) for t in scheduler.timesteps]


@PREDICTION
@pytest.mark.parametrize("steps", [2, 13])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("euler", "EulerDiscreteScheduler"),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("kdpm2", "KDPM2DiscreteScheduler"),
        ("lms", "LMSDiscreteScheduler"),
    ],
)
def test_sigma_space(monkeypatch, name, cls, spacing, steps, prediction):
    if prediction == "sample" and name != "euler":
        return  # diffusers has none there
    scheduler = make(cls, prediction, timestep_spacing=spacing)
    want, times = theirs(monkeypatch, scheduler, steps, network())
    if name in ("heun", "kdpm2"):
        times = times[::2] if name == "kdpm2" else times
    alpha = Discrete().at(times[0])[0]
    close(ours(name, prediction, times, scale=float(scheduler.init_noise_sigma) * alpha), want)


DPM = [
    ("dpm_solver_1", {"algorithm_type": "dpmsolver", "solver_order": 1, "final_sigmas_type": "sigma_min"}),
    ("dpm_solver_2m", {"algorithm_type": "dpmsolver", "solver_order": 2, "final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "sigma_min"}),
    ("dpmpp_2m", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    ("dpmpp_2m_sde", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
]


@PREDICTION
@pytest.mark.parametrize("steps", [1, 2, 13])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("name", "config"), DPM)
def test_dpm_multistep(monkeypatch, name, config, spacing, steps, prediction):
    config = {"lower_order_final": "final_sigmas_type" not in config, **config}
    scheduler = make("DPMSolverMultistepScheduler", prediction, timestep_spacing=spacing, **config)
    want, times = theirs(monkeypatch, scheduler, steps, network())
    end = "first" if config.get("final_sigmas_type") else "data"
    close(ours(name, prediction, times, end=end), want)


@PREDICTION
@pytest.mark.parametrize("steps", [6, 7, 8])
@pytest.mark.parametrize(
    ("name", "algorithm", "order"),
    [("dpm_solver_2s", "dpmsolver", 2), ("dpm_solver_3s", "dpmsolver", 3), ("dpmpp_2s", "dpmsolver++", 2)],
)
def test_dpm_singlestep(monkeypatch, name, algorithm, order, steps, prediction):
    last = "zero" if algorithm == "dpmsolver++" else "sigma_min"
    config = {"algorithm_type": algorithm, "solver_order": order, "final_sigmas_type": last}
    # "heun" is their name for the parabola through three points, which is third order on any path.
    kind = "heun" if order == 3 else "midpoint"
    lower = last == "zero" or steps % order != 0
    scheduler = make("DPMSolverSinglestepScheduler", prediction, solver_type=kind, lower_order_final=lower, **config)
    want, times = theirs(monkeypatch, scheduler, steps, network())
    close(ours(name, prediction, times, end="data" if last == "zero" else "first"), want)


@PREDICTION
@pytest.mark.parametrize("steps", [2, 13])
@pytest.mark.parametrize(("name", "order"), [("unipc", 2), ("unipc_3", 3)])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_unipc(monkeypatch, spacing, name, order, steps, prediction):
    scheduler = make("UniPCMultistepScheduler", prediction, solver_order=order, timestep_spacing=spacing)
    want, times = theirs(monkeypatch, scheduler, steps, network())
    close(ours(name, prediction, times), want)


@PREDICTION
@pytest.mark.parametrize("steps", [2, 13])
def test_deis(monkeypatch, steps, prediction):
    scheduler = make("DEISMultistepScheduler", prediction, solver_order=3, lower_order_final=False)
    want, times = theirs(monkeypatch, scheduler, steps, network())
    close(ours("deis", prediction, times, end="first"), want)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("name", "skip"), [("pndm", False), ("plms", True)])
def test_pndm(monkeypatch, name, skip, steps):
    scheduler = make("PNDMScheduler", "epsilon", skip_prk_steps=skip)
    want, times = theirs(monkeypatch, scheduler, steps, network())
    times = [float(t) for t in range(1000 - 1000 // steps, -1, -(1000 // steps))]
    close(ours(name, "epsilon", times), want)


@PREDICTION
@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize(("name", "cls"), [("lcm", "LCMScheduler"), ("tcd", "TCDScheduler")])
def test_few_steps(monkeypatch, name, cls, steps, prediction):
    scheduler = make(cls, prediction, clip_sample=False)
    want, times = theirs(monkeypatch, scheduler, steps, network())
    close(ours(name, prediction, times), want)
