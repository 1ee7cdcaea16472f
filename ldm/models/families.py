"""What users of a published family expect where they say nothing: its pictures, its sampler, its fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ldm.models.networks import AnyNetwork
from ldm.models.transformers.flux import FluxConfig
from ldm.models.transformers.flux_control import FluxControlConfig
from ldm.models.transformers.sd3 import SD3Config
from ldm.models.transformers.sd3_control import SD3ControlConfig
from ldm.models.unet import ControlNetConfig, IPAdapterConfig, UNetConfig
from ldm.models.unet.image_prompt import places


@dataclass(frozen=True, kw_only=True)
class Family:
    """Defaults of one family.

    `size`: side in pixels. `sampler`, `steps`, `guidance`: as its published pipeline draws; `grid`: the sigmas that
    this asks of a flow's scheduler, "flow" the scheduler's own, "flow_open" 1 ... 1/N. Of a fine-tuning: `rate` of a
    LoRA, `full_rate` of all weights, `rank` and `targets` of a LoRA (ends of layer names, or groups), `density` of
    training times (None: the process's), `guidance_told`: what a network with an embedding of the guidance scale is
    told while it trains; `recompute`: gradient checkpointing, without which few GPUs hold it.
    """

    title: str
    size: int
    sampler: str
    steps: int
    guidance: float
    rate: float = 1e-4
    full_rate: float = 1e-5
    rank: int = 4
    targets: tuple[str, ...] = ("attention",)
    density: Mapping[str, Any] | None = None
    grid: Literal["flow", "flow_open"] = "flow"
    guidance_told: float | None = None
    recompute: bool = False


_JOINT = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip
SD15 = Family(title="Stable Diffusion 1", size=512, sampler="dpmpp_2m", steps=25, guidance=7.5, full_rate=5e-6)
SD2 = Family(title="Stable Diffusion 2", size=768, sampler="dpmpp_2m", steps=25, guidance=7.5, full_rate=5e-6)
SDXL = Family(title="Stable Diffusion XL", size=1024, sampler="dpmpp_2m", steps=30, guidance=5.0, full_rate=5e-6)
SD2_TURBO, SDXL_TURBO = (
    replace(f, title=f"{f.title} Turbo", size=512, sampler=sampler, steps=4, guidance=1.0)
    for f, sampler in ((SD2, "euler"), (SDXL, "euler_ancestral"))
)
"""The same networks, distilled: their schedulers begin at the last time."""
SD3 = Family(
    title="Stable Diffusion 3", size=1024, sampler="euler", steps=28, guidance=7.0, targets=_JOINT,
    density={"kind": "logit_normal"}, rank=16, recompute=True,
)  # fmt: skip
FLUX = Family(
    title="FLUX.1", size=1024, sampler="euler", steps=28, guidance=3.5, guidance_told=1.0,
    targets=(*_JOINT, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    density={"kind": "logit_normal"}, rank=16, recompute=True, grid="flow_open",
)  # fmt: skip
FLUX_SCHNELL = Family(
    title="FLUX.1 schnell", size=1024, sampler="euler", steps=4, guidance=1.0, targets=FLUX.targets,
    density=FLUX.density, rank=16, recompute=True, grid="flow_open",
)  # fmt: skip
FLUX_FILL = replace(FLUX, title="FLUX.1 Fill", steps=50, guidance=30.0)
FLUX_GUIDED = replace(FLUX, guidance_told=None)
"""dev without its embedding: guidance was trained out again, and takes two evaluations."""
PIXART = Family(title="PixArt", size=1024, sampler="dpmpp_2m", steps=20, guidance=4.5, rank=16, recompute=True)
ZIMAGE = Family(
    title="Z-Image", size=1024, sampler="euler", steps=50, guidance=5.0, rank=16, recompute=True,
    targets=("to_q", "to_k", "to_v", "to_out.0"), density={"kind": "logit_normal"}, grid="flow_open",
)  # fmt: skip
"""Its pipeline's guidance scale is ours - 1."""
ZIMAGE_TURBO = replace(ZIMAGE, title="Z-Image-Turbo", steps=8, guidance=1.0)
"""The same network, distilled, with a flow's shift of 3 instead of 6."""
FAMILIES = {"sd15": SD15, "sd2": SD2, "sdxl": SDXL, "sd2_turbo": SD2_TURBO, "sdxl_turbo": SDXL_TURBO, "sd3": SD3,
            "flux": FLUX, "flux_schnell": FLUX_SCHNELL, "flux_guided": FLUX_GUIDED, "flux_fill": FLUX_FILL,
            "pixart": PIXART, "zimage": ZIMAGE, "zimage_turbo": ZIMAGE_TURBO}  # fmt: skip


def family_of(network: AnyNetwork, scheduler: Mapping[str, Any] | None = None) -> Family:
    """The family of a network's settings; `scheduler`, its config in diffusers' keys, tells those of one network apart.

    Those are Z-Image and its Turbo, FLUX.1 schnell and a dev without its guidance embedding, Stable Diffusion and its
    Turbos. Nothing tells SD3.5's Turbos from their bases.
    """
    how = scheduler or {}
    if isinstance(network, UNetConfig):
        wide = network.per_level("cross_attention_dim")[0]
        if network.addition_embed_type == "text_time":
            return SDXL_TURBO if _of_turbo(how) else SDXL
        return (SD2_TURBO if _of_turbo(how) else SD2) if wide == 1024 else SD15
    if network.kind == "flux" and network.in_channels > network.token_channels:
        return FLUX_FILL
    if network.kind == "flux" and not network.guidance_embeds:
        return FLUX_GUIDED if how.get("use_dynamic_shifting") else FLUX_SCHNELL
    if network.kind == "zimage" and how.get("shift") == 3:
        return ZIMAGE_TURBO
    return FAMILIES[network.kind]


def _of_turbo(scheduler: Mapping[str, Any]) -> bool:
    euler = scheduler.get("_class_name") in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    plain = scheduler.get("prediction_type", "epsilon") == "epsilon" and not scheduler.get("rescale_betas_zero_snr")
    return euler and plain and scheduler.get("timestep_spacing") == "trailing"


AnyControlConfig = ControlNetConfig | SD3ControlConfig | FluxControlConfig


def check_control(control: AnyControlConfig, network: AnyNetwork, name: str, base: str) -> None:
    """Raise ValueError unless a ControlNet's features are those of the network; `name` and `base` call both."""
    if isinstance(control, SD3ControlConfig | FluxControlConfig):
        _check_transformer(control, network, name, base)
        return
    if not isinstance(network, UNetConfig):
        raise ValueError(f"{name} is a ControlNet of {_of(control)}, but {base} is {family_of(network).title}")
    half = control.unet
    keys = ("block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type",
            "projection_class_embeddings_input_dim", "class_embed_type")  # fmt: skip
    told = [(key, _levels(half, key), _levels(network, key)) for key in keys]
    odd = [f"{key} {mine} for {its}" for key, mine, its in told if mine != its]
    if half.in_channels not in (network.out_channels, network.in_channels):
        odd.append(f"in_channels {half.in_channels} for {network.in_channels}")
    if odd:
        mine, its = _of(control), family_of(network).title
        families = f"of {mine}, but {base} is {its}" if mine != its else f"of another {mine} than {base}"
        raise ValueError(f"{name} is a ControlNet {families}: {odd[0]}")


def _check_transformer(
    control: SD3ControlConfig | FluxControlConfig, network: AnyNetwork, name: str, base: str
) -> None:
    of, cls = (SD3, SD3Config) if isinstance(control, SD3ControlConfig) else (FLUX, FluxConfig)
    if not isinstance(network, cls):
        raise ValueError(f"{name} is a ControlNet of {of.title}, but {base} is {family_of(network).title}")
    keys = ["width", "in_channels", "joint_attention_dim", "pooled_projection_dim"]
    told = [(key, getattr(control, key), getattr(network, key)) for key in keys]
    if odd := [f"{key} {mine} for {its}" for key, mine, its in told if mine != its]:
        raise ValueError(f"{name} is a ControlNet of another {of.title} than {base}: {odd[0]}")


def _of(control: ControlNetConfig) -> str:
    return family_of(control.unet).title


def _levels(config: UNetConfig, key: str) -> Any:
    value = config.per_level(key) if key in ("layers_per_block", "cross_attention_dim") else getattr(config, key)
    return list(value) if isinstance(value, tuple) else value


def check_ip_adapter(adapter: IPAdapterConfig, network: AnyNetwork, name: str, base: str) -> None:
    """Raise ValueError unless an IP-Adapter's layers are those of the network; `name` and `base` call both."""
    known = {(16, 768): SD15, (16, 1024): SD2, (70, 2048): SDXL}.get((len(adapter.layers), adapter.width))
    mine = "a U-Net of its own" if known is None else known.title
    if not isinstance(network, UNetConfig):
        raise ValueError(f"{name} is an IP-Adapter of {mine}, but {base} is {family_of(network).title}")
    layers = tuple(channels for _, channels in sorted(places(network)))
    widths = sorted(set(network.per_level("cross_attention_dim")))
    odd = [] if [adapter.width] == widths else [f"tokens of {adapter.width} for {', '.join(map(str, widths))}"]
    if adapter.layers != layers:
        count = f"{len(adapter.layers)} cross-attentions for {len(layers)}"
        differ = [(i, a, b) for i, (a, b) in enumerate(zip(adapter.layers, layers)) if a != b]
        odd.append(count if len(adapter.layers) != len(layers) else
                   f"cross-attention {differ[0][0]} of {differ[0][1]} channels for {differ[0][2]}")  # fmt: skip
    if odd:
        its = family_of(network).title
        families = f"of {mine}, but {base} is {its}" if mine != its else f"of another {mine} than {base}"
        raise ValueError(f"{name} is an IP-Adapter {families}: {odd[0]}")
