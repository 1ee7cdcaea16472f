"""Names of the same weights in other formats, as plans: new name -> (old names, how the new tensor is made of them).

A plan is made from names alone, is strict both ways, and is carried out one tensor at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.checkpoint.weights import Entry, Source, listed


@dataclass(frozen=True)
class Part:
    """One tensor of the new format."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor] | None = None


Plan = dict[str, Part]


def follow(plan: Plan, source: Source, what: str, left: list[str] | None = None) -> dict[str, Entry]:
    """The tensors of the new format, each made when it is read.

    Raises ValueError listing tensors that the plan needs and the source lacks, and those that nothing uses; `left`
    takes the latter instead.
    """
    used = {name for part in plan.values() for name in part.sources}
    if missing := sorted(used - set(source)):
        raise ValueError(f"{what}: missing {listed(missing)}")
    if extra := sorted(set(source) - used):
        if left is None:
            raise ValueError(f"{what}: not known {listed(extra)}")
        left += extra
    return {name: _entry(part, source) for name, part in plan.items()}


def _entry(part: Part, source: Source) -> Entry:
    olds = [source[name] for name in part.sources]
    if part.make is None:
        return olds[0]
    make = part.make
    with torch.device("meta"):
        made = make(*(torch.empty(e.shape, dtype=e.dtype) for e in olds))
    return Entry(made.shape, made.dtype, lambda: make(*(e.read() for e in olds)))


def carry_out(plan: Plan, state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """`follow` on tensors in memory."""
    source = {k: Entry(v.shape, v.dtype, lambda v=v: v) for k, v in state.items()}
    return {k: e.read() for k, e in follow(plan, source, what).items()}


# ---- text towers: open_clip (native) <-> Hugging Face CLIPTextModel(WithProjection) ----

_HF_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_HF_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_HF_EYE = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
}
_NATIVE_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)$")
_UNUSED = re.compile(r"(.*\.)?(position_ids|logit_scale|attn_mask)$|(vision_model|visual_projection|visual)\.")


def text_layers(names: Iterable[str]) -> int:
    """Number of layers of a tower with native names."""
    found = [m for m in map(_NATIVE_LAYER.match, names) if m]
    return 1 + max((int(m[1]) for m in found), default=-1)


def hf_layers(names: Iterable[str]) -> int:
    """The same of a tower with Hugging Face's names."""
    found = [m for m in (re.match(r"(?:text_model\.)?encoder\.layers\.(\d+)\.", n) for n in names) if m]
    return 1 + max((int(m[1]) for m in found), default=-1)


def open_text(source: Source) -> dict[str, Entry]:
    """A tower with native names, whose projection some tools store the other way round, as a linear layer's weight."""
    out = {k: e for k, e in source.items() if k != "text_projection.weight"}
    if "text_projection.weight" in source:
        out["text_projection"] = _entry(Part(("text_projection.weight",), _transpose), source)
    return out


def text_to_hf(names: Iterable[str]) -> Plan:
    """Native names of a text tower -> plan for HF's; q, k and v are split, the projection transposed."""
    top = {v: "text_model." + k for k, v in _HF_TOP.items()}
    block = {v: k for k, v in _HF_BLOCK.items()}
    plan: Plan = {}
    for key in names:
        match = _NATIVE_LAYER.match(key)
        if key in top:
            plan[top[key]] = Part((key,))
        elif key == "text_projection":
            plan["text_projection.weight"] = Part((key,), _transpose)
        elif match and match[2] in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = match[2].rpartition("_")[2]
            for i, letter in enumerate("qkv"):
                new = f"text_model.encoder.layers.{match[1]}.self_attn.{letter}_proj.{kind}"
                plan[new] = Part((key,), lambda x, i=i: x.chunk(3)[i])
        elif match and match[2].rpartition(".")[0] in block:
            name, _, kind = match[2].rpartition(".")
            plan[f"text_model.encoder.layers.{match[1]}.{block[name]}.{kind}"] = Part((key,))
        else:
            raise ValueError(f"text tower: no Hugging Face name for {key!r}")
    return plan


def text_from_hf(names: Iterable[str]) -> Plan:
    """HF names, with or without the `text_model.` prefix -> plan for native ones."""
    names = list(names)
    prefix = "text_model." if any(n.startswith("text_model.") for n in names) else ""
    layers = re.compile(re.escape(prefix) + r"encoder\.layers\.(\d+)\.")
    count = 1 + max((int(m[1]) for m in map(layers.match, names) if m), default=-1)
    plan = {native: Part((prefix + hf,)) for hf, native in _HF_TOP.items()} | _layers_from_hf(prefix, count)
    if "text_projection.weight" in names:
        plan["text_projection"] = Part(("text_projection.weight",), _transpose)
    return plan


def vision_from_hf(names: Iterable[str]) -> Plan:
    """HF names of a `CLIPVisionModelWithProjection` -> plan for those of open_clip's image tower."""
    head = "vision_model."
    layers = re.compile(re.escape(head) + r"encoder\.layers\.(\d+)\.")
    count = 1 + max((int(m[1]) for m in map(layers.match, names) if m), default=-1)
    plan = {native: Part((head + hf,)) for hf, native in _HF_EYE.items()}
    plan["proj"] = Part(("visual_projection.weight",), _transpose)
    for kind in ("weight", "bias"):
        plan[f"ln_pre.{kind}"] = Part((f"{head}pre_layrnorm.{kind}",))
        plan[f"ln_post.{kind}"] = Part((f"{head}post_layernorm.{kind}",))
    return plan | _layers_from_hf(head, count)


def _layers_from_hf(prefix: str, count: int) -> Plan:
    """The layers of a tower."""
    plan: Plan = {}
    for i in range(count):
        old, new = f"{prefix}encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            for hf, native in _HF_BLOCK.items():
                plan[f"{new}{native}.{kind}"] = Part((f"{old}{hf}.{kind}",))
            qkv = tuple(f"{old}self_attn.{letter}_proj.{kind}" for letter in "qkv")
            plan[f"{new}attn.in_proj_{kind}"] = Part(qkv, _join)
    return plan


def without_constants(source: Source) -> dict[str, Entry]:
    """A tower's tensors without the constants that old files carry, and without the other half of a whole CLIP."""
    return {k: e for k, e in source.items() if not _UNUSED.match(k)}


# ---- autoencoder: files of diffusers before 0.18 name the attention's layers otherwise ----

_OLD_COMPVIS = re.compile(r"(.*\.mid\.attn_1\.)(to_q|to_k|to_v|to_out\.0|query|key|value|proj_attn|group_norm)\.")
_COMPVIS_VAE = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "query": "q", "key": "k", "value": "v",
                "proj_attn": "proj_out", "group_norm": "norm"}  # fmt: skip
_OLD_VAE = re.compile(r"(.*mid_block\.attentions\.0\.)(query|key|value|proj_attn)\.(weight|bias)$")
_NEW_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_vae(source: Source) -> dict[str, Entry]:
    """The autoencoder's tensors under today's names."""
    out = {}
    for key, entry in source.items():
        match = _OLD_VAE.match(key)
        out[f"{match[1]}{_NEW_VAE[match[2]]}.{match[3]}" if match else key] = entry
    return out


def compvis_vae(source: Source) -> dict[str, Entry]:
    """The autoencoder's tensors under CompVis' names, also where a converter left diffusers' in the attention."""
    rename = lambda m: f"{m[1]}{_COMPVIS_VAE[m[2]]}."  # noqa: E731
    return {_OLD_COMPVIS.sub(rename, k): e for k, e in source.items()}


# ---- CompVis and Stability single files ----

Names = dict[str, str]
"""Native name -> the other format's name."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_to_compvis(names: Iterable[str], down: Sequence[int], attend_up: Sequence[bool]) -> Names:
    """Names of the U-Net; `down` is the number of resnets of each level, `attend_up` which up stages have attention."""
    table = dict(_UNET_TOP)
    block = 1
    for i, count in enumerate(down):
        for j in range(count):
            table[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{block}.0"
            table[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{block}.1"
            block += 1
        table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
        block += 1
    block = 0
    for i, count in enumerate(reversed(down)):
        for j in range(count + 1):
            table[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{block}.0"
            table[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{block}.1"
            block += 1
        table[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{block - 1}.{1 + attend_up[i]}.conv"
    return {name: _renamed(name, table, _RESNET) for name in names}


def vae_to_compvis(names: Iterable[str], levels: int) -> Names:
    """Names of the autoencoder; its up stages are numbered from the finest there."""
    table = {}
    for half in ("encoder", "decoder"):
        table |= {f"{half}.{layer}": f"{half}.{layer}" for layer in ("conv_in", "conv_out")}
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for i in range(2):
            table[f"{half}.mid_block.resnets.{i}"] = f"{half}.mid.block_{i + 1}"
        for layer, other in _VAE_ATTENTION.items():
            table[f"{half}.mid_block.attentions.0.{layer}"] = f"{half}.mid.attn_1.{other}"
    table |= {layer: layer for layer in ("quant_conv", "post_quant_conv")}
    for i in range(levels):
        j = levels - 1 - i
        table[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        table[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{j}.upsample.conv"
        table[f"encoder.down_blocks.{i}.resnets"] = f"encoder.down.{i}.block"
        table[f"decoder.up_blocks.{i}.resnets"] = f"decoder.up.{j}.block"
    return {name: _renamed(name, table, _VAE_RESNET) for name in names}


def _renamed(name: str, table: Mapping[str, str], resnet: Mapping[str, str]) -> str:
    """`name` with its longest known beginning replaced, and the layer of a resnet behind it."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        head = ".".join(parts[:cut])
        if head in table:
            tail = parts[cut:]
            if ".resnets" in head:
                tail = [resnet.get(part, part) for part in tail]
            return ".".join([table[head], *tail])
    raise ValueError(f"{name!r} has no name in this format")


def renaming(names: Names, *, back: bool = False) -> Plan:
    """A plan for a table of names; the autoencoder's attention, linear here, is 1x1 convolutions there."""
    plan: Plan = {}
    for native, other in names.items():
        flat = ".mid_block.attentions.0.to_" in native and native.endswith(".weight")
        make = (_flatten if back else _widen) if flat else None
        new, old = (native, other) if back else (other, native)
        plan[new] = Part((old,), make)
    return plan


def prefixed(prefix: str, source: Source) -> dict[str, Entry]:
    """Every name with `prefix` before it."""
    return {prefix + k: e for k, e in source.items()}


def under(prefix: str, source: Source) -> dict[str, Entry]:
    """The tensors whose name starts with `prefix`, without it."""
    return {k.removeprefix(prefix): e for k, e in source.items() if k.startswith(prefix)}


def _widen(x: Tensor) -> Tensor:
    return x[:, :, None, None]


def _flatten(x: Tensor) -> Tensor:
    return x.flatten(1)


def _transpose(x: Tensor) -> Tensor:
    return x.T.contiguous()


def _join(*parts: Tensor) -> Tensor:
    return torch.cat(parts)
