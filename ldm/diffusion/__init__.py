"""The diffusion process, pure: torch in, torch out; no parameters, no randomness of its own."""

from ldm.diffusion.density import Importance, ImportanceTimes, LogitNormal, UniformTimes
from ldm.diffusion.likelihood import Bound, bound, hybrid_loss
from ldm.diffusion.prediction import PREDICTIONS, Epsilon, Prediction, Sample, V, Velocity, convert
from ldm.diffusion.process import LearnedDenoise, Process, posterior
from ldm.diffusion.schedule import Discrete, Flow, Schedule
from ldm.diffusion.weighting import P2, SNR, VLB, MinSNR, Uniform, Weighting

__all__ = [
    "P2",
    "PREDICTIONS",
    "SNR",
    "VLB",
    "Bound",
    "Discrete",
    "Epsilon",
    "Flow",
    "Importance",
    "ImportanceTimes",
    "LearnedDenoise",
    "LogitNormal",
    "MinSNR",
    "Prediction",
    "Process",
    "Sample",
    "Schedule",
    "Uniform",
    "UniformTimes",
    "V",
    "Velocity",
    "Weighting",
    "bound",
    "convert",
    "hybrid_loss",
    "posterior",
]
