"""The diffusion process, pure: torch in, torch out; no parameters, no randomness of its own."""

from ldm.diffusion.density import (
    CosMap,
    FluxShift,
    Importance,
    ImportanceTimes,
    LogitNormal,
    Mode,
    ShiftedUniform,
    UniformTimes,
)
from ldm.diffusion.likelihood import Bound, bound, hybrid_loss
from ldm.diffusion.prediction import PREDICTIONS, Epsilon, Prediction, Sample, V, Velocity, convert
from ldm.diffusion.process import LearnedDenoise, Process, posterior
from ldm.diffusion.schedule import Discrete, DynamicShift, Flow, Schedule
from ldm.diffusion.weighting import (
    P2,
    SNR,
    VLB,
    X0,
    CosMapWeight,
    Debiased,
    MinSNR,
    SigmaSqrt,
    SoftMinSNR,
    Uniform,
    Weighting,
)

__all__ = [
    "P2",
    "PREDICTIONS",
    "SNR",
    "VLB",
    "X0",
    "Bound",
    "CosMap",
    "CosMapWeight",
    "Debiased",
    "Discrete",
    "DynamicShift",
    "Epsilon",
    "Flow",
    "FluxShift",
    "Importance",
    "ImportanceTimes",
    "LearnedDenoise",
    "LogitNormal",
    "MinSNR",
    "Mode",
    "Prediction",
    "Process",
    "Sample",
    "Schedule",
    "ShiftedUniform",
    "SigmaSqrt",
    "SoftMinSNR",
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
