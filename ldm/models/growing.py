"""Deeper networks that begin as shallower ones: new layers are inserted that do nothing yet, so that the answer is the
same bit for bit at the moment of growing, and learn from then on.

Progressive growth in depth as in Gong et al. 2019 (StackBERT), but with layers that start as the identity (ReZero's
and DiT's zero gates; arXiv 2003.04887, 2212.09748), as SANA 1.5 grows its network (arXiv 2501.18427, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.models.network import Network
from ldm.models.networks import AnyNetwork, build
from ldm.models.transformers.pixart import PixArtBlock
from ldm.models.transformers.sd3 import SD3Config
from ldm.models.unet.config import UNetConfig
from ldm.models.unet.encoder import Stage
from ldm.models.unet.unet import UNet

DEPTHS: Mapping[str, Mapping[str, str]] = {
    "unet": {"layers_per_block": ""},
    "sd3": {"num_layers": "transformer_blocks"},
    "flux": {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"},
    "pixart": {"num_layers": "transformer_blocks"},
    "zimage": {"n_layers": "layers"},
}
"""By the network's kind: the settings that may grow, and the list of blocks that each counts."""
FREE = ("sample_size", "dropout")
"""Settings that are no part of the weights."""


def check_growth(own: AnyNetwork, wanted: AnyNetwork) -> None:
    """Raise ValueError unless a network can grow from `own` to `wanted`: more layers, and all else as it is."""
    if type(own) is not type(wanted):
        raise ValueError(f"grow: from {own.kind!r} to {wanted.kind!r}; only the number of layers may be another")
    free = {*DEPTHS[own.kind], *FREE, *(["dual_attention_layers"] if isinstance(own, SD3Config) else [])}
    odd = [
        f.name for f in fields(own) if f.name not in free and not _same(getattr(own, f.name), getattr(wanted, f.name))
    ]
    if odd:
        told = "; ".join(f"{name} {getattr(wanted, name)!r} for {getattr(own, name)!r}" for name in odd[:4])
        raise ValueError(f"grow: only the number of layers ({', '.join(DEPTHS[own.kind])}) may be another: {told}")
    for name in DEPTHS[own.kind]:
        before, after = _counts(own, name), _counts(wanted, name)
        if any(b > a for b, a in zip(before, after, strict=True)):
            raise ValueError(f"grow: {name} {getattr(wanted, name)!r} is fewer than the start's {getattr(own, name)!r}")
    if all(_counts(own, name) == _counts(wanted, name) for name in DEPTHS[own.kind]):
        raise ValueError(f"grow: {', '.join(DEPTHS[own.kind])} as the start has it: nothing to grow; write false")
    if isinstance(own, SD3Config) and isinstance(wanted, SD3Config):
        _check_dual(own, wanted)


def grown(network: Network, wanted: AnyNetwork) -> Network:
    """A network of the settings `wanted` that answers as this one does, whose weights it has.

    Blocks of transformers are added after the last one (SD3's own last, which leaves the text behind, stays the last);
    layers of a U-Net at the end of each resolution on the way down, and behind the first on the way up. New weights are
    drawn by torch's generator. Raises ValueError as `check_growth` does.
    """
    own = network.config
    check_growth(own, wanted)
    made = build(wanted)
    if isinstance(made, UNet):
        places = dict(_unet_places(own, cast("UNetConfig", wanted)))
    else:
        places = dict(_block_places(own, wanted))
    weights = {_moved(name, places): value for name, value in network.state_dict().items()}
    told = made.state_dict()
    with torch.no_grad():
        for name, module in _new_blocks(made, set(places.values())):
            _start_as_identity(module)
            told |= {f"{name}.{n}": v for n, v in module.state_dict().items()}
    made.load_state_dict(told | weights, strict=True)
    return made.to(next(network.parameters()).device).train(network.training)


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are equal; one value stands for a list of it, as for all levels of a U-Net."""
    if isinstance(a, (tuple, list)) != isinstance(b, (tuple, list)):
        many, one = (a, b) if isinstance(a, (tuple, list)) else (b, a)
        return all(value == one for value in many)
    return tuple(a) == tuple(b) if isinstance(a, (tuple, list)) else a == b


def _counts(config: AnyNetwork, name: str) -> tuple[int, ...]:
    return tuple(config.per_level(name)) if isinstance(config, UNetConfig) else (getattr(config, name),)


def _check_dual(own: SD3Config, wanted: SD3Config) -> None:
    """SD3.5 medium's blocks with a second attention must be those that have one already, where they stand now."""
    last = own.num_layers - 1
    for old in range(own.num_layers):
        new = wanted.num_layers - 1 if old == last else old
        if (old in own.dual_attention_layers) != (new in wanted.dual_attention_layers):
            raise ValueError(
                f"grow: dual_attention_layers {list(wanted.dual_attention_layers)}: block {old} of the start, block "
                f"{new} then, {'has' if old in own.dual_attention_layers else 'has no'} second attention"
            )


def _block_places(own: AnyNetwork, wanted: AnyNetwork) -> Iterator[tuple[str, str]]:
    """Names of a transformer's blocks, and where they stand then."""
    for setting, blocks in DEPTHS[own.kind].items():
        before, after = getattr(own, setting), getattr(wanted, setting)
        for i in range(before):
            last = isinstance(own, SD3Config) and i == before - 1
            yield f"{blocks}.{i}", f"{blocks}.{after - 1 if last else i}"


def _unet_places(own: UNetConfig, wanted: UNetConfig) -> Iterator[tuple[str, str]]:
    """Names of the layers of a U-Net's resolutions, and where they stand then.

    A layer that does nothing leaves the same skip connection again. On the way up the first layer takes the last of
    them, which is what it took before; new ones, whose input has the resolution's own width, take the next.
    """
    pairs = zip(own.per_level("layers_per_block"), wanted.per_level("layers_per_block"), strict=True)
    for level, (before, after) in enumerate(pairs):
        up = own.levels - 1 - level
        for kind in ("resnets", "attentions"):
            for i in range(before):
                yield f"down_blocks.{level}.{kind}.{i}", f"down_blocks.{level}.{kind}.{i}"
            for i in range(before + 1):
                yield f"up_blocks.{up}.{kind}.{i}", f"up_blocks.{up}.{kind}.{i + (after - before if i else 0)}"


def _moved(name: str, places: Mapping[str, str]) -> str:
    """A weight's name where its block stands now."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in places:
            return ".".join([places[prefix], *parts[length:]])
    return name


def _new_blocks(made: Network, old: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Those where no old one stands: a layer of a U-Net and its transformer each for itself."""
    if not isinstance(made, UNet):
        lists = DEPTHS[made.config.kind].values()
        for blocks in lists:
            for i, block in enumerate(made.get_submodule(blocks).children()):
                if f"{blocks}.{i}" not in old:
                    yield f"{blocks}.{i}", block
        return
    for way in ("down_blocks", "up_blocks"):
        for level, stage in enumerate(cast("list[Stage]", list(made.get_submodule(way).children()))):
            for name, module in stage.layers():
                full = f"{way}.{level}.{name}"
                if name.startswith(("resnets.", "attentions.")) and full not in old:
                    yield full, module


def _start_as_identity(block: nn.Module) -> None:
    """What fresh blocks are not yet: gates, U-Nets' last convolutions and projections begin at zero by themselves."""
    if isinstance(block, PixArtBlock):  # whose gates are a table's, of random numbers
        for layer in (block.attn1.get_submodule("to_out.0"), block.attn2.get_submodule("to_out.0"), block.ff.net[2]):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
    shortcut = getattr(block, "conv_shortcut", None)
    if isinstance(shortcut, nn.Conv2d):  # of what came before and of the skip connection, the former
        nn.init.zeros_(shortcut.weight)
        nn.init.zeros_(cast("Tensor", shortcut.bias))
        for i in range(shortcut.out_channels):
            shortcut.weight[i, i] = 1.0


def with_free(wanted: AnyNetwork, own: AnyNetwork) -> AnyNetwork:
    """The wanted settings, with the start's size of pictures where they tell none."""
    free: dict[str, Any] = {
        name: getattr(own, name) for name in FREE if hasattr(own, name) and getattr(wanted, name) is None
    }
    return replace(wanted, **free)
