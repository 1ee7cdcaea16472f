"""The layers that a low-rank correction can sit on, under the names that files use.

A network's layer has its own name under its component's (`unet.`); a text tower's layers have Hugging Face's names
under `text_encoder.` or `text_encoder_2.`, where query, key and value are rows of one weight here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

from ldm.adapters.base import COMPONENTS
from ldm.models.families import family_of
from ldm.models.frozen import Stored
from ldm.models.network import Network
from ldm.models.text import T5Encoder, TextEncoder, TextTower

GROUPS = ("attention", "feed_forward", "projection", "convolution", "time")
_TEXT = {
    "mlp.c_fc": ("mlp.fc1", "feed_forward"),
    "mlp.c_proj": ("mlp.fc2", "feed_forward"),
}


@dataclass(frozen=True)
class Site:
    """Rows `[start, stop)` of one layer's weight. `module` is the layer, or the attention that holds the rows.

    `parameter` and `bias`: where its weight and its bias are below the module; they are looked up at every use.
    `transposed`: the weight is stored as (in, out).
    """

    name: str
    group: str
    module: nn.Module
    parameter: str
    bias: str | None
    start: int
    stop: int
    transposed: bool = False

    @property
    def conv(self) -> nn.Conv2d | None:
        """The layer, if it is a convolution."""
        return self.module if isinstance(self.module, nn.Conv2d) else None

    def read(self) -> Tensor:
        """The layer's weight (out, in[, kh, kw]), without gradient; writing into it changes the model.

        Of a weight that is `stored` it is a copy in float32.
        """
        layer, name = self._holder
        weight = layer.whole(name, torch.float32) if isinstance(layer, Stored) and self.stored else getattr(layer, name)
        weight = weight.detach()
        return (weight.T if self.transposed else weight)[self.start : self.stop]

    @property
    def stored(self) -> bool:
        """Whether the weight is stored in fewer bits (`models.frozen`): writing into what `read` gives is lost."""
        layer, name = self._holder
        return isinstance(layer, Stored) and name not in layer._parameters

    @property
    def _holder(self) -> tuple[nn.Module, str]:
        inner, _, name = self.parameter.rpartition(".")
        return self.module.get_submodule(inner), name

    def read_bias(self) -> Tensor | None:
        """The layer's bias (out,)."""
        return None if self.bias is None else attrgetter(self.bias)(self.module)[self.start : self.stop]


def _layer(name: str, group: str, layer: nn.Linear | nn.Conv2d) -> Site:
    """A whole linear layer or convolution."""
    rows = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return Site(name, group, layer, "weight", None if layer.bias is None else "bias", 0, rows)


def network_sites(network: Network) -> list[Site]:
    """The layers of the network that adapters may correct."""
    found = []
    for name, module, group in network.correctable():
        assert isinstance(module, (nn.Linear, nn.Conv2d))
        found.append(_layer(f"{network.component}.{name}", group, module))
    return found


def usual_targets(network: Network) -> tuple[str, ...]:
    """The targets where none are named: those of the family's community."""
    return family_of(network.config).targets


def towers(text: Sequence[TextEncoder]) -> list[tuple[str, TextTower]]:
    """The CLIP towers among the text encoders, and the names of their folders: the only ones that adapters train."""
    return [(name, one) for name, one in zip(COMPONENTS, text, strict=False) if isinstance(one, TextTower)]


def pooled_of(network: Network, text: Sequence[TextEncoder]) -> list[bool]:
    """For each text encoder, whether the network is given its pooled vector: a U-Net the last one's, others all."""
    used = "pooled" in network.needs
    return [used and (network.component != "unet" or i == len(text) - 1) for i in range(len(text))]


def text_sites(text: Sequence[TextEncoder], *, pooled: Sequence[bool] | None = None) -> list[Site]:
    """The linear layers of the CLIP towers' blocks; a last block that SD 2.x does not use is not in its files.

    With `pooled`, only of blocks that the conditioning depends on: for each encoder, whether its pooled vector is used.
    """
    found = []
    uses: dict[str, bool] = dict(zip(COMPONENTS, pooled or [False] * len(text), strict=False))
    for component, tower in towers(text):
        whole = tower.config.output == "last" or (tower.config.output == "penultimate" and pooled is None)
        whole = whole or uses[component]
        for i, block in enumerate(tower.model.transformer.resblocks[: None if whole else -1]):
            prefix = f"{component}.text_model.encoder.layers.{i}."
            attention, width = block.attn, tower.config.width
            assert isinstance(attention, nn.MultiheadAttention)
            for k, letter in enumerate("qkv"):
                name, rows = f"{prefix}self_attn.{letter}_proj", (k * width, (k + 1) * width)
                bias = None if attention.in_proj_bias is None else "in_proj_bias"
                found.append(Site(name, "attention", attention, "in_proj_weight", bias, *rows))
            name, parts = f"{prefix}self_attn.out_proj", ("out_proj.weight", "out_proj.bias")
            found.append(Site(name, "attention", attention, parts[0], parts[1], 0, width))
            for native, (name, group) in _TEXT.items():
                layer = block.get_submodule(native)
                assert isinstance(layer, nn.Linear)
                found.append(_layer(prefix + name, group, layer))
    return found


def t5_sites(text: Sequence[TextEncoder]) -> list[Site]:
    """The linear layers of T5 encoders, which files may correct; those of 8 bits are none. Adapters do not train them.

    Names are transformers' own under the encoder's component: "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q".
    """
    found = []
    for component, encoder in zip(COMPONENTS, text, strict=False):
        if not isinstance(encoder, T5Encoder):
            continue
        for name, module in encoder.model.named_modules():
            if isinstance(module, nn.Linear):
                group = "attention" if "SelfAttention" in name else "feed_forward"
                found.append(_layer(f"{component}.{name}", group, module))
    return found


def all_sites(network: Network, text: Sequence[TextEncoder]) -> dict[str, Site]:
    """Every site of a model by name."""
    return {site.name: site for site in [*network_sites(network), *text_sites(text), *t5_sites(text)]}


def other_sites(network: Network, text: Sequence[TextEncoder]) -> dict[str, Site]:
    """What only others' files correct: norms, biases under NAME.bias, the towers' projections."""
    found = {}

    def add(name: str, module: nn.Module, *parameters: str) -> None:
        for parameter in parameters:
            if (value := getattr(module, parameter, None)) is not None:
                own, group = (name, "norm") if parameter == "weight" else (f"{name}.bias", "bias")
                found[own] = Site(own, group, module, parameter, None, 0, len(value))

    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            add(f"{network.component}.{name}", module, "bias")
        elif isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.ndim == 1:  # a norm
            add(f"{network.component}.{name}", module, "weight", "bias")
    for site in text_sites(text):
        if site.bias is not None:
            own = f"{site.name}.bias"
            found[own] = Site(own, "bias", site.module, site.bias, None, site.start, site.stop)
    for component, tower in towers(text):
        for i, block in enumerate(tower.model.transformer.resblocks):
            for k, norm in enumerate((block.ln_1, block.ln_2), 1):
                add(f"{component}.text_model.encoder.layers.{i}.layer_norm{k}", norm, "weight", "bias")
        add(f"{component}.text_model.final_layer_norm", tower.model.ln_final, "weight", "bias")
        projection = tower.model.text_projection
        if isinstance(projection, nn.Parameter):
            own = f"{component}.text_projection"
            found[own] = Site(own, "projection", tower.model, "text_projection", None, 0, projection.shape[1], True)
    return found


def chosen(sites: Sequence[Site], targets: Sequence[str]) -> list[Site]:
    """The sites of some groups, or whose name ends with a target such as "attn2.to_k".

    Raises ValueError for a target that names no layer here.
    """
    found: dict[str, Site] = {}
    for target in targets:
        hits = [s for s in sites if s.group == target or s.name.endswith(f".{target}")]
        if not hits and target not in GROUPS:
            ends = sorted({s.name.rpartition(".")[2] for s in sites if not s.name[-1].isdigit()})
            allowed = f"{list(GROUPS)} and ends of names, such as {ends[:8]}"
            raise ValueError(f"targets: {target!r} is no layer here; allowed are {allowed}")
        found |= {s.name: s for s in hits}
    if not found:
        raise ValueError(f"targets: {list(targets)} choose no layer of this model")
    return [s for s in sites if s.name in found]
