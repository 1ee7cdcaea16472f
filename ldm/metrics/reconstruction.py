"""How much of a picture an autoencoder keeps: PSNR and SSIM per picture, of (B, C, H, W) in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_WINDOW, _SIGMA = 11, 1.5


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB; infinite for equal pictures."""
    _check(images, truth)
    # a range of 2: the peak's square is 4
    error = (images.double() - truth.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (B,) in [-1, 1]: Wang et al. 2004, eq. 13; Gaussian window 11, sigma 1.5, no padding."""
    _check(images, truth)
    if min(images.shape[-2:]) < _WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {_WINDOW} pixels, got {tuple(images.shape[-2:])}")
    x, y = (images.double() + 1) / 2, (truth.double() + 1) / 2  # its luminance term knows where black is
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean((1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    """Gaussian mean of every full window, (B, C, H, W) -> (B, C, H - 10, W - 10), as two one-dimensional passes."""
    place = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    kernel = torch.exp(-(place**2) / (2 * _SIGMA**2))
    kernel = kernel / kernel.sum()
    channels = x.shape[1]
    x = functional.conv2d(x, kernel.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
    return functional.conv2d(x, kernel.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)


def _check(images: Tensor, truth: Tensor) -> None:
    if images.shape != truth.shape or images.ndim != 4:
        raise ValueError(f"pictures: expected equal (B, C, H, W), got {tuple(images.shape)} and {tuple(truth.shape)}")
