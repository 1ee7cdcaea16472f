"""What both sides of the U-Nets' measurements share: shapes, networks with the same weights, inputs and steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import parts
from ldm.config.load import encode
from ldm.models.presets import UNETS
from ldm.models.unet import UNet, UNetConfig


@dataclass(frozen=True)
class Shape:
    """A network, its latents' side and text, and batches: of a training step, of drawn pictures.

    `twice`: whether the machine has room for two processes that train it.
    """

    config: UNetConfig
    side: int
    tokens: int
    batch: int
    drawn: int
    rounds: int
    twice: bool = True


_THREE = replace(
    UNETS["emoji"], sample_size=32, block_out_channels=(64, 128, 256), layers_per_block=2, attention_head_dim=(2, 4, 8)
)
SHAPES = {
    "emoji": Shape(UNETS["emoji"], 16, 32, 32, 8, 8),
    "three levels of 64": Shape(_THREE, 32, 77, 8, 4, 5),
    "sd15": Shape(UNETS["sd15"], 32, 77, 1, 1, 2, twice=False),
}
QUICK = {"tiny": Shape(UNETS["tiny"], 8, 7, 2, 1, 2)}
Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, t, text states) -> output."""


def both(config: UNetConfig) -> tuple[UNet, nn.Module]:
    """Our network, and theirs with our parameters themselves: there is memory for one set of SD's."""
    from diffusers import UNet2DConditionModel

    ours = parts.unet(config)
    nn.init.normal_(ours.conv_out.weight, std=0.02)  # starts at zero, and zeros would agree whatever came before
    with torch.device("meta"):
        theirs: Any = UNet2DConditionModel.from_config(
            {k: v for k, v in encode(config).items() if v is not None and k != "kind"}
        )
    own = dict(ours.named_parameters())
    names = [name for name, _ in theirs.named_parameters()]
    if set(names) != set(own):
        raise ValueError("the two networks have not the same parameters")
    for name in names:
        where, _, last = name.rpartition(".")
        setattr(theirs.get_submodule(where), last, own[name])
    return ours, theirs


def adam(network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of both sides."""
    return torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)


def training(
    optimizer: torch.optim.Optimizer, call: Network, x: Tensor, t: Tensor, text: Tensor, *, half: bool = False
) -> Callable[[], object]:
    """A step of the mean squared error to a fixed target; `half`: under bfloat16 autocast."""
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = (call(x, t, text).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """PyTorch's attention by its formula."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def under(
    context: Callable[[], contextlib.AbstractContextManager[Any]], step: Callable[[], object]
) -> Callable[[], object]:
    """The step inside a context."""

    def inside() -> None:
        with context():
            step()

    return inside


def deviation(a: Tensor, b: Tensor) -> float:
    """Relative to the second."""
    return float((a - b).norm() / b.norm())


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and text states of a training step."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(shape.batch, shape.config.in_channels, shape.side, shape.side, generator=g)
    text = torch.randn(shape.batch, shape.tokens, parts.text_states(shape.config), generator=g)
    return x, torch.randint(0, 1000, (shape.batch,), generator=g), text


def call_of(network: nn.Module) -> Network:
    """One way to call either network."""
    if isinstance(network, UNet):
        return lambda x, t, text: network(x, t, {"text": text})
    return lambda x, t, text: network(x, t, encoder_hidden_states=text, return_dict=False)[0]


def quiet(call: Network, *given: Tensor) -> Callable[[], object]:
    """The forward pass alone."""

    @torch.no_grad()
    def forward() -> Tensor:
        return call(*given)

    return forward
