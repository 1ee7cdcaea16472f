"""Where scripts of version 0.1 look for `ldm.metrics.fid`; to be removed with version 0.3."""

from __future__ import annotations

from ldm.metrics.fid import Gaussian, compare, frechet_distance, kernel_distance, mmd2, precision_recall

__all__ = ["Gaussian", "compare", "frechet_distance", "kernel_distance", "mmd2", "precision_recall"]
