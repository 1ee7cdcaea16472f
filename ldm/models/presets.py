"""Named configurations: the published families, and the small ones of this project."""

from __future__ import annotations

from dataclasses import replace

from ldm.models.networks import AnyNetwork
from ldm.models.text import ClipConfig, TextConfig
from ldm.models.text.config import AnyText, QwenConfig, T5Config
from ldm.models.transformers import presets as transformers
from ldm.models.unet import UNetConfig
from ldm.models.vae.autoencoder import AutoencoderConfig

_SD15 = UNetConfig(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
_SD21 = UNetConfig(
    sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
)
_SDXL = UNetConfig(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
# 5.44 M parameters, 0.81 GFLOP a forward pass. A small package limits the parameters, so they are spent on the two
# finer levels, where convolutions share weights over most pixels; attention sees the text at 8x8 and 4x4.
_EMOJI = UNetConfig(
    sample_size=16,
    block_out_channels=(96, 128, 96),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=192,
    attention_head_dim=(3, 4, 3),
    use_linear_projection=True,
)

UNETS: dict[str, UNetConfig] = {
    "sd15": _SD15,
    "sd15_inpainting": replace(_SD15, in_channels=9),
    "sd15_pix2pix": replace(_SD15, in_channels=8),
    "x4_upscaler": UNetConfig(
        sample_size=128,
        in_channels=7,
        block_out_channels=(256, 512, 512, 1024),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
        cross_attention_dim=1024,
        attention_head_dim=8,
        only_cross_attention=(True, True, True, False),
        use_linear_projection=True,
        num_class_embeds=1000,
    ),
    "lcm_sd15": replace(_SD15, time_cond_proj_dim=256),
    "sd21": _SD21,
    "sd21_base": replace(_SD21, sample_size=64),
    "sdxl": _SDXL,
    "emoji": _EMOJI,
    "tiny": UNetConfig(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=2,
    ),
}

_KL_16 = AutoencoderConfig(sample_size=1024, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)

AUTOENCODERS: dict[str, AutoencoderConfig] = {
    "kl_f8": AutoencoderConfig(),
    "kl_f4_upscaler": AutoencoderConfig(block_out_channels=(128, 256, 512), sample_size=256, scaling_factor=0.08333),
    "kl_f8_sdxl": AutoencoderConfig(sample_size=1024, scaling_factor=0.13025),
    "kl_f8_sd3": replace(_KL_16, scaling_factor=1.5305, shift_factor=0.0609),
    "kl_f8_flux": replace(_KL_16, scaling_factor=0.3611, shift_factor=0.1159),
    "tiny": AutoencoderConfig(
        block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=32, scaling_factor=1.0
    ),
}

PRESETS: dict[str, AnyNetwork] = {
    **UNETS,
    "sd3_medium": transformers.SD3_MEDIUM,
    "sd35_medium": transformers.SD35_MEDIUM,
    "sd35_large": transformers.SD35_LARGE,
    "flux_dev": transformers.FLUX_DEV,
    "flux_schnell": transformers.FLUX_SCHNELL,
    "pixart_sigma": transformers.PIXART_SIGMA,
    "zimage": transformers.ZIMAGE,
}
"""Networks of every kind."""

_CLIP_L = TextConfig(width=768, heads=12, layers=12, activation="quick_gelu", pad="eot")
_OPEN_H = TextConfig(width=1024, heads=16, layers=24, activation="gelu", pad="zero", projection=1024)
_OPEN_G = TextConfig(width=1280, heads=20, layers=32, activation="gelu", pad="zero", projection=1280)
TEXTS: dict[str, tuple[AnyText, ...]] = {
    "sd15": (_CLIP_L,),
    "sd21": (replace(_OPEN_H, output="penultimate_norm"),),
    "sdxl": (
        replace(_CLIP_L, output="penultimate", zero_empty=True),
        replace(_OPEN_G, output="penultimate", zero_empty=True),
    ),
    "sd3": (
        replace(_CLIP_L, output="penultimate", projection=768),
        replace(_OPEN_G, output="penultimate"),
        T5Config(max_length=256),
    ),
    "flux": (_CLIP_L, T5Config(max_length=512)),
    "flux_schnell": (_CLIP_L, T5Config(max_length=256)),
    "pixart": (T5Config(max_length=300, masked=True, lower=True),),
    "zimage": (QwenConfig(),),
    "tiny": (
        TextConfig(width=32, heads=2, layers=2, context_length=32, vocab_size=4096, activation="gelu", bpe="emoji"),
    ),
}

CLIPS: dict[str, ClipConfig] = {
    "emoji": ClipConfig(),
    "tiny": ClipConfig(
        embed_dim=16, text_width=32, text_heads=2, text_layers=2, vision_width=32, vision_layers=1, vision_head_width=16
    ),
}


def usual_of_unet(network: AnyNetwork) -> tuple[str, str] | None:
    """Presets of the autoencoder and the text towers that a U-Net usually has; None for other networks."""
    if not isinstance(network, UNetConfig):
        return None
    named = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
    vae = "kl_f8_sdxl" if network.addition_embed_type else "kl_f8"
    return vae, named.get(network.per_level("cross_attention_dim")[0], "sd21")
