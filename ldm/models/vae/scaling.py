"""The same autoencoder with another scaling factor: its latents are larger or smaller by as much."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch

from ldm.models.vae.autoencoder import Autoencoder


def at_scale(autoencoder: Autoencoder, scale: float) -> Autoencoder:
    """A copy with scaling factor `scale`, whose scaled latents and pictures are the same to rounding.

    Its 1x1 convolutions around the latents take the difference. Raises ValueError for one without them, or that shifts.
    """
    config = autoencoder.config
    before, after = autoencoder.quant_conv, autoencoder.post_quant_conv
    if before is None or after is None or config.shift_factor:
        raise ValueError(
            f"its scaling factor is {config.scaling_factor} and cannot become {scale}: that takes 1x1 convolutions "
            "around the latents, and no shift"
        )
    made = copy.deepcopy(autoencoder)
    made.config = replace(config, scaling_factor=scale)
    ratio, z = config.scaling_factor / scale, config.latent_channels
    assert made.quant_conv is not None
    assert made.post_quant_conv is not None
    with torch.no_grad():
        made.quant_conv.weight[:z] *= ratio
        assert made.quant_conv.bias is not None
        made.quant_conv.bias[:z] *= ratio
        made.quant_conv.bias[z:] += 2 * math.log(ratio)  # of the logarithm of the variance
        made.post_quant_conv.weight /= ratio
    return made
