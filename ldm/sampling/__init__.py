"""Samplers, the times they visit, and guidance. Importing the package fills `SAMPLERS`."""

from ldm.sampling import exponential, pseudo, solvers
from ldm.sampling.registry import SAMPLERS, SamplerInfo, lookup, sample
from ldm.sampling.run import clamp, dynamic_threshold
from ldm.sampling.times import SPACINGS, times

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "SamplerInfo",
    "clamp",
    "dynamic_threshold",
    "exponential",
    "lookup",
    "pseudo",
    "sample",
    "solvers",
    "times",
]
