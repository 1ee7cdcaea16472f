"""The families that are measured: networks with random weights, ours and diffusers', and what they are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.prediction import V, Velocity
from ldm.diffusion.process import Process
from ldm.diffusion.schedule import Discrete, Flow
from ldm.models.network import Network
from ldm.models.networks import AnyNetwork, build, diffusers_keys
from ldm.models.presets import UNETS
from ldm.models.transformers import presets
from ldm.types import Cond

HALF = torch.bfloat16
SHIFT = 3.0
TOLD = 3.5
"""The guidance scale that FLUX.1 dev is told."""
PACK = 2
"""Latent pixels along the side of a token that diffusers' FLUX.1 is given."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A network and its shapes: latents' `side`, text `tokens`; samples of a step, pictures of a batch, and `steps`.

    `guidance` 1 is one call a step. `peer`: diffusers' class. `parts` of the blocks are measured where `scaled` has two
    configs of fewer, from which the whole's step is told (`whole` over the smaller one's blocks).
    """

    name: str
    title: str
    config: AnyNetwork
    side: int
    tokens: int
    batch: int
    drawn: int
    steps: int = 20
    guidance: float = 5.0
    peer: str = "UNet2DConditionModel"
    pixels: int = 512
    blocks: str = ""
    """What is measured of it, where that is not all."""

    @property
    def unet(self) -> bool:
        """Whether it is a U-Net."""
        return self.peer.startswith("UNet")

    @property
    def flux(self) -> bool:
        """Whether it is FLUX.1, which is told its guidance."""
        return self.peer.startswith("Flux")


FLUX_PARTS = (1, 2)
"""Of FLUX.1's 19 joint and 38 single blocks one more joint and two more single ones each time."""
FLUX_WHOLE = 19


def flux(times: int) -> Any:
    """FLUX.1 dev at full width with so many joint blocks and twice as many single ones."""
    return replace(presets.FLUX_DEV, num_layers=times, num_single_layers=2 * times)


_FLUX = Family(
    name="flux", title="FLUX.1 dev", config=flux(2), side=128, tokens=512, batch=4, drawn=1, guidance=1.0,
    peer="FluxTransformer2DModel", pixels=1024,
)  # fmt: skip
_ALL = (
    Family(name="sd2", title="SD 2", config=UNETS["sd21_base"], side=64, tokens=77, batch=32, drawn=8),
    Family(name="sd15", title="SD 1.5", config=UNETS["sd15"], side=64, tokens=77, batch=32, drawn=8),
    Family(name="sdxl", title="SDXL", config=UNETS["sdxl"], side=128, tokens=77, batch=8, drawn=2, pixels=1024),
    Family(
        name="sd35", title="SD3.5 medium", config=presets.SD35_MEDIUM, side=128, tokens=333, batch=8, drawn=2,
        peer="SD3Transformer2DModel", pixels=1024,
    ),
    *(
        replace(_FLUX, name=f"flux{n}", config=flux(2 * n), blocks=f"{2 * n} + {4 * n} of 19 + 38 blocks")
        for n in FLUX_PARTS
    ),
)  # fmt: skip
FAMILIES: dict[str, Family] = {f.name: f for f in _ALL}


def tiny(family: Family) -> Family:
    """The same family in the smallest size, to see that everything runs."""
    config: Any = replace(UNETS["tiny"], use_linear_projection=family.name == "sd2")
    if family.name == "sdxl":
        config = replace(
            config, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=40
        )
    if family.peer.startswith("SD3"):
        config = presets.SD3_TINY
    if family.flux:
        layers = family.config.num_layers // 2  # type: ignore[union-attr]
        config = replace(presets.FLUX_TINY, num_layers=layers, num_single_layers=2 * layers)
    return replace(family, config=config, side=8, tokens=7, batch=2, drawn=1, steps=2)


def scrambled(network: nn.Module) -> nn.Module:
    """No weight at zero, as of a network that was trained: products of zeros take a card less power and time."""
    for name, p in network.named_parameters():
        nn.init.normal_(p, std=0.02)
        if p.ndim == 1 and name.endswith("weight"):  # norms
            p.data += 1
    return network


def ours(family: Family, device: str, dtype: torch.dtype = torch.float32) -> Network:
    """Our network on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        network = build(family.config)
    scrambled(network)
    return network.to(dtype)


def theirs(family: Family, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' network of the same shape."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    keys = {k: v for k, v in diffusers_keys(family.config).items() if v is not None}
    with torch.device(device):
        network = getattr(diffusers, family.peer).from_config(keys)
    return scrambled(network).to(device=device, dtype=dtype)


@dataclass(frozen=True)
class Given:
    """x (B, C, H, W), t (B,), and what either network is told: "text", and "pooled", "time_ids", "guidance" if any."""

    x: Tensor
    t: Tensor
    cond: Cond

    def rows(self, count: int) -> Given:
        """The first ones."""
        return Given(self.x[:count], self.t[:count], {k: v[:count] for k, v in self.cond.items()})


def given(family: Family, rows: int, device: str, dtype: torch.dtype = torch.float32) -> Given:
    """Random inputs of so many samples; on "meta" without values."""
    config, draw = family.config, _Draw(device, dtype)
    if family.unet:
        width, channels = config.per_level("cross_attention_dim")[0], config.in_channels  # type: ignore[union-attr]
    else:
        width = config.joint_attention_dim  # type: ignore[union-attr]
        channels = config.in_channels // (PACK**2 if family.flux else 1)
    cond: Cond = {"text": draw(rows, family.tokens, width)}
    pooled = _pooled(family)
    if pooled:
        cond["pooled"] = draw(rows, pooled)
    if family.unet and pooled:
        sizes = torch.tensor([family.pixels, family.pixels, 0, 0, family.pixels, family.pixels], dtype=torch.float32)
        cond["time_ids"] = sizes.to(device).expand(rows, 6).contiguous()
    if family.flux:
        cond["guidance"] = torch.full((rows,), TOLD, device=device)
    t = torch.linspace(10, 900, rows, device=device).round()
    return Given(draw(rows, channels, family.side, family.side), t, cond)


def _pooled(family: Family) -> int:
    config: Any = family.config
    if not family.unet:
        return config.pooled_projection_dim
    extra = config.projection_class_embeddings_input_dim
    return extra - 6 * config.addition_time_embed_dim if extra else 0


@dataclass
class _Draw:
    device: str
    dtype: torch.dtype
    seed: int = field(default=4)

    def __call__(self, *shape: int) -> Tensor:
        if self.device == "meta":
            return torch.empty(*shape, device="meta", dtype=self.dtype)
        self.seed += 1
        g = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randn(*shape, device=self.device, generator=g).to(self.dtype)


def call_theirs(family: Family, network: Any) -> Callable[[Tensor, Tensor, Cond], Tensor]:
    """Their network called as ours is; FLUX.1's latents are packed as its pipeline packs them."""
    if family.flux:
        return _call_flux(network)
    if not family.unet:
        return lambda x, t, cond: network(x, cond["text"], cond["pooled"], t, return_dict=False)[0]

    def call(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]} if "pooled" in cond else None
        more = {} if added is None else {"added_cond_kwargs": added}
        return network(x, t, encoder_hidden_states=cond["text"], return_dict=False, **more)[0]

    return call


def compile_blocks(network: Any, **how: Any) -> None:
    """Their regional compilation; where their class names no blocks that repeat (SD3), of its transformer blocks."""
    if type(network)._repeated_blocks:
        network.compile_repeated_blocks(**how)
        return
    for block in network.transformer_blocks:
        block.compile(**how)


def _call_flux(network: Any) -> Callable[[Tensor, Tensor, Cond], Tensor]:
    places: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # which their pipeline makes once, too

    def call(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        b, c, h, w = x.shape
        tokens = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)
        kind = (h, w, cond["text"].shape[1], x.dtype, x.device)
        if kind not in places:
            still = torch.zeros(cond["text"].shape[1], 3, device=x.device, dtype=x.dtype)
            places[kind] = (_places(h // 2, w // 2, x), still)
        told = (cond["text"], cond["pooled"], t / 1000, *places[kind], cond["guidance"])
        out = network(tokens, *told, return_dict=False)[0]
        return out.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)

    return call


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """(N, 3): nothing, row, column of every token."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(like)


def process(family: Family) -> Process:
    """v-prediction of the U-Nets, velocity of the transformers."""
    if family.unet:
        return Process(schedule=Discrete(), prediction=V())
    return Process(schedule=Flow(shift=SHIFT), prediction=Velocity())
