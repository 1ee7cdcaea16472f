"""Published configurations of the transformers, and a tiny one of each family for tests."""

from __future__ import annotations

from dataclasses import replace

from ldm.models.transformers.flux import FluxConfig
from ldm.models.transformers.pixart import PixArtConfig
from ldm.models.transformers.sd3 import SD3Config
from ldm.models.transformers.zimage import ZImageConfig

SD3_MEDIUM = SD3Config(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192)
SD35_MEDIUM = replace(SD3_MEDIUM, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")
SD35_LARGE = replace(SD3_MEDIUM, num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm")
SD3_TINY = SD3Config(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=20,
    caption_projection_dim=32,
    pooled_projection_dim=12,
    pos_embed_max_size=12,
    dual_attention_layers=(0, 1),
    qk_norm="rms_norm",
)

FLUX_DEV = FluxConfig(guidance_embeds=True)
FLUX_SCHNELL = FluxConfig()
FLUX_TINY = FluxConfig(
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=20,
    pooled_projection_dim=12,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
)

PIXART_SIGMA = PixArtConfig(caption_channels=4096, interpolation_scale=2, use_additional_conditions=False)
"""At 1024 pixels; 256, 512 and 2048 have sample_size 32, 64, 256 and interpolation_scale 0.5, 1, 4."""
PIXART_TINY = PixArtConfig(
    num_attention_heads=3,
    attention_head_dim=8,
    num_layers=2,
    cross_attention_dim=24,
    sample_size=8,
    caption_channels=20,
    interpolation_scale=1,
    use_additional_conditions=False,
)

ZIMAGE = ZImageConfig(axes_lens=(1536, 512, 512))
"""Z-Image and Z-Image-Turbo."""
ZIMAGE_TINY = ZImageConfig(
    in_channels=4,
    dim=48,
    n_layers=3,
    n_refiner_layers=1,
    n_heads=3,
    n_kv_heads=3,
    cap_feat_dim=20,
    axes_dims=(4, 6, 6),
    axes_lens=(160, 32, 32),
)
