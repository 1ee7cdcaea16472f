"""ControlNets in files: diffusers' folders and the authors' single files (`control_model.*`), read and written.

The authors' files hold no settings: those of Stable Diffusion 1 and 2 are told by their shapes. Ours carry them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import maps, weights
from ldm.checkpoint.convert import FORMATS, from_hub
from ldm.checkpoint.files import whole_file, whole_folder
from ldm.checkpoint.folder import STEM
from ldm.checkpoint.opened import fill
from ldm.checkpoint.pipelines import VERSION
from ldm.checkpoint.settings import read_json, write_json
from ldm.checkpoint.weights import Source
from ldm.config.load import decode, encode
from ldm.models import presets
from ldm.models.shipped import named
from ldm.models.transformers.flux_control import FluxControlConfig, FluxControlNet
from ldm.models.transformers.sd3_control import SD3ControlConfig, SD3ControlNet
from ldm.models.unet import ControlNet, ControlNetConfig, UNetConfig

AnyConfig = ControlNetConfig | SD3ControlConfig | FluxControlConfig
AnyControl = ControlNet | SD3ControlNet | FluxControlNet
FOLDER = "controlnet"
CLASSES: dict[str, type[AnyConfig]] = {
    "ControlNetModel": ControlNetConfig,
    "SD3ControlNetModel": SD3ControlConfig,
    "ControlNetSD3Model": SD3ControlConfig,
    "FluxControlNetModel": FluxControlConfig,
}
"""Of `config.json`; the last as the first of SD3's were published."""
PREFIX = "control_model."
_CONFIG = "ldm.controlnet"
_HINT, _IN, _KEYS = "input_hint_block.0.weight", "input_blocks.0.0.weight", ".attn2.to_k.weight"
_WHOLE = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
"""What the first files of ControlNet hold beside it: all of Stable Diffusion."""
_OTHERS = {
    "controlnet_x_embedder.weight": "FLUX.1's ControlNet; give diffusers' folder",
    "lora_controlnet": "a Control-LoRA",
    "task_embedding": "a ControlNet Union",
    "adapter.body.0.in_conv.weight": "a T2I-Adapter",
}


def folder_of(source: str | Path) -> Path | None:
    """The folder of a ControlNet's own files at a path: itself, its `controlnet/`, or a run's export; None if none."""
    path = Path(source)
    for folder in (path, path / FOLDER, path / "export", path / "export" / FOLDER):
        if (folder / "config.json").is_file() and read_json(folder / "config.json").get("_class_name") in CLASSES:
            return folder
    return None


def load_control(source: str | Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32) -> AnyControl:
    """A ControlNet from diffusers' folder, a run, or a single file in the authors' names or diffusers'.

    Raises ValueError for anything else, naming it, and for tensors that are missing or not known.
    """
    config, source_of = open_control(source, variant=variant)
    shapes = _shapes(config)
    found = weights.reshaped(source_of, shapes)
    weights.check_keys(f"{source}: ControlNet", shapes, weights.shapes(found))
    model = fill(_empty(config), found, dtype, str(source))
    assert isinstance(model, ControlNet | SD3ControlNet | FluxControlNet)
    return model.requires_grad_(False)


def open_control(source: str | Path, *, variant: str | None = None) -> tuple[AnyConfig, Source]:
    """Its settings, and its tensors by native name, not read yet; a hub id is a folder, too."""
    path = named(source)
    if path.is_file():
        return _open_file(path)
    if not path.exists() and str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        path = from_hub(str(source))
    folder = folder_of(path)
    if folder is None:
        raise ValueError(f"{source}: no ControlNet: {_seen(path)}")
    told = read_json(folder / "config.json")
    plain = {k: v for k, v in told.items() if not k.startswith("_")}
    return decode(CLASSES[told["_class_name"]], plain, str(folder)), weights.open_folder(folder, STEM, variant)


def save_control(
    folder: Path, config: AnyConfig, state: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> None:
    """Write diffusers' folder, whole or not at all; an old one stays until the new one is whole.

    Raises ValueError for tensors that are not those of the settings.
    """
    source = weights.of_state(state)
    weights.check_keys(f"{folder}: ControlNet", _shapes(config), weights.shapes(source))
    with whole_folder(folder) as beside:
        write_control(beside, config, source, dtype=dtype)


def write_control(folder: Path, config: AnyConfig, source: Source, *, dtype: torch.dtype | None = None) -> None:
    """The settings and tensors of a ControlNet as diffusers has them, in a folder that is there."""
    if isinstance(config, ControlNetConfig):
        heads = config.unet.heads
        one = heads if len(set(heads)) > 1 else heads[0]
        config = replace(config, attention_head_dim=one, num_attention_heads=None)
    name = next(name for name, cls in CLASSES.items() if isinstance(config, cls))
    about = {"_class_name": name, "_diffusers_version": VERSION}
    write_json(folder / "config.json", about | encode(config))
    weights.write_folder(folder, STEM, source, dtype=dtype)


def save_control_single(path: Path, control: ControlNet, *, dtype: torch.dtype | None = None) -> None:
    """Write the authors' single file. Raises ValueError for SDXL's, which have none."""
    write_single(path, control.config, weights.of_state(control.state_dict()), dtype=dtype)


def write_single(path: Path, config: AnyConfig, source: Source, *, dtype: torch.dtype | None = None) -> None:
    """One safetensors file of a ControlNet's tensors in the authors' names, whole or not at all."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a name that ends in .safetensors")
    if not isinstance(config, ControlNetConfig) or config.addition_embed_type is not None:
        raise ValueError(f"{path}: ControlNets of Stable Diffusion XL, 3 and FLUX.1 have no single file of their "
                         "authors; write diffusers' folder, whose weights every program reads")  # fmt: skip
    out = maps.prefixed(PREFIX, maps.follow(maps.renaming(names(config)), source, "ControlNet"))
    with whole_file(path) as new:
        weights.write_file(new, out, dtype=dtype, metadata={_CONFIG: json.dumps(encode(config))})


def names(config: ControlNetConfig) -> maps.Names:
    """Native name -> the authors', without what stands before all of theirs."""
    own = [k for k in _shapes(config) if not k.startswith("controlnet_")]
    unet = config.unet
    table = maps.unet_to_compvis(own, unet.per_level("layers_per_block"), [True] * unet.levels)
    for key in _shapes(config):
        if key in table:
            continue
        layer, _, kind = key.rpartition(".")
        table[key] = f"{_layer(layer, len(config.conditioning_embedding_out_channels))}.{kind}"
    return table


def _layer(layer: str, widths: int) -> str:
    head, _, tail = layer.partition(".")
    if head == "controlnet_mid_block":
        return "middle_block_out.0"
    if head == "controlnet_down_blocks":
        return f"zero_convs.{tail}.0"
    if tail == "conv_in":
        return "input_hint_block.0"
    place = 2 * widths - 1 if tail == "conv_out" else 1 + int(tail.removeprefix("blocks."))
    return f"input_hint_block.{2 * place}"  # a SiLU stands behind each


def _open_file(path: Path) -> tuple[ControlNetConfig, Source]:
    source, about = weights.open_file(path), weights.metadata(path)
    if "controlnet_cond_embedding.conv_in.weight" in source:
        return _from_shapes(source, path, native=True), source
    inner = maps.under(PREFIX, source) or {k: e for k, e in source.items() if not k.startswith(_WHOLE)}
    if _HINT not in inner:
        who = next((what for mark, what in _OTHERS.items() if any(k.startswith(mark) for k in source)), None)
        raise ValueError(f"{path}: no ControlNet: {'it is ' + who if who else _names(source)}")
    config = decode(ControlNetConfig, json.loads(about[_CONFIG]), str(path)) if _CONFIG in about else _from_shapes(
        inner, path, native=False
    )  # fmt: skip
    plan = maps.renaming(names(config), back=True)
    return config, maps.follow(plan, inner, f"{path}: ControlNet")


def _from_shapes(source: Source, path: Path, *, native: bool) -> ControlNetConfig:
    """The settings of a published family, as far as the shapes tell; sizes and channels of the condition are read."""
    first = source["conv_in.weight" if native else _IN].shape
    wide = {e.shape[1] for k, e in source.items() if k.endswith(_KEYS)}
    stages = {int(k.split(".")[1]) for k in source if k.startswith("down_blocks.")}
    family = (
        "sdxl" if "add_embedding.linear_1.weight" in source else {768: "sd15", 1024: "sd21"}.get(max(wide, default=0))
    )
    if family is None or first[0] != 320:
        raise ValueError(f"{path}: a ControlNet of no published family (widths {sorted(wide)} of the text, {first[0]} "
                         "of its first layer); give diffusers' folder, which has its settings")  # fmt: skip
    unet = presets.UNETS[family]
    assert isinstance(unet, UNetConfig)
    hint = "controlnet_cond_embedding.conv_in.weight" if native else _HINT
    config = replace(ControlNetConfig.of(unet, 8, source[hint].shape[1]), in_channels=first[1])
    if family == "sdxl" and len(stages) == 3:
        depths = tuple(_depth(source, head) for head in ("down_blocks.0.", "down_blocks.1.", "mid_block."))
        kinds = tuple("CrossAttnDownBlock2D" if any(k.startswith(f"down_blocks.{i}.attentions.") for k in source)
                      else "DownBlock2D" for i in range(3))  # fmt: skip
        config = replace(config, transformer_layers_per_block=depths, down_block_types=kinds)
    return config


def _depth(source: Source, head: str) -> int:
    """Transformer blocks of a stage's first transformer."""
    mark = f"{head}attentions.0.transformer_blocks."
    return 1 + max((int(k.removeprefix(mark).split(".")[0]) for k in source if k.startswith(mark)), default=-1)


def is_control(source: str | Path) -> bool:
    """Whether a path is a ControlNet's file or folder, by its names alone."""
    path = Path(source)
    if path.is_dir():
        return folder_of(path) is not None
    if not path.is_file():
        return False
    try:
        found = weights.open_file(path)
    except ValueError:
        return False
    return any(k.endswith(_HINT) or k == "controlnet_cond_embedding.conv_in.weight" for k in found)


def _shapes(config: AnyConfig) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in _empty(config).state_dict().items()}


def _empty(config: AnyConfig) -> AnyControl:
    with torch.device("meta"):
        if isinstance(config, FluxControlConfig):
            return FluxControlNet(config)
        return SD3ControlNet(config) if isinstance(config, SD3ControlConfig) else ControlNet(config)


def _names(source: Source) -> str:
    heads = list(dict.fromkeys(".".join(k.split(".")[:2]) for k in sorted(source)))
    return f"its tensors are {', '.join(heads[:4])}{', ...' if len(heads) > 4 else ''}"


def _seen(path: Path) -> str:
    if not path.exists():
        return "no such file or folder"
    told = path / "config.json"
    if told.is_file():
        return f"its config.json is of {read_json(told).get('_class_name')!r}, not one of {list(CLASSES)}"
    if (path / "model_index.json").is_file():
        return f"it is a whole model of class {read_json(path / 'model_index.json').get('_class_name')!r}"
    return "it has no config.json"


def convert_control(
    source: str | Path, target: Path, to: str, *, dtype: torch.dtype | None, variant: str | None
) -> int:
    """Read one form, write another ("diffusers", "compvis" or "single"), a tensor at a time; the number of tensors.

    Raises ValueError for another form, and a target that exists.
    """
    if to not in FORMATS:
        raise ValueError(f"--to {to}: of a ControlNet there are {', '.join(FORMATS)}")
    if target.exists():
        raise ValueError(f"{target}: exists already")
    config, found = open_control(source, variant=variant)
    found = weights.reshaped(found, _shapes(config))
    weights.check_keys(f"{source}: ControlNet", _shapes(config), weights.shapes(found))
    target.parent.mkdir(parents=True, exist_ok=True)
    if to == "diffusers":
        with whole_folder(target) as beside:
            write_control(beside, config, found, dtype=dtype)
    else:
        write_single(target, config, found, dtype=dtype)
    return len(found)
