"""Find what a run starts from: its data, and frozen parts (shipped models by name, run exports, diffusers folders)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm import dist
from ldm.checkpoint import convert, vision
from ldm.checkpoint.folder import NETWORKS, network_in, open_network, open_vae
from ldm.checkpoint.folders import read_module
from ldm.checkpoint.ip_adapter_files import ABOUT
from ldm.checkpoint.opened import load_encoder
from ldm.checkpoint.vision import is_image_encoder
from ldm.config.load import decode, encode
from ldm.data.mixture import Data, open_data
from ldm.data.stream import Stream, Tokenize
from ldm.models.network import Network
from ldm.models.networks import AnyNetwork
from ldm.models.shipped import locate, named, text_home
from ldm.models.text import (
    ClipConfig,
    MissingConfig,
    TextConfig,
    TextEncoder,
    TextPrecision,
    TextTower,
    build_clip,
    check_text_precision,
    encode_texts,
    openclip,
    text_dtype,
)
from ldm.models.text.openclip import AnyClip
from ldm.models.text.vision import ImageEncoder, of_clip
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.pipeline import TextToImage
from ldm.types import Cond

if TYPE_CHECKING:
    from ldm.train.trainer import TrainConfig

EncodeText = Callable[[Sequence[str]], Cond]
ADAPTER = "adapter.json"
_PARTS = ("", *(f"{name}/" for name in NETWORKS), "vae/", "text_encoder/", "clip/")


def training_data(
    data: Data,
    train: TrainConfig,
    seed: int,
    workers: int,
    *,
    tokenize: Tokenize | None = None,
    expect: Mapping[str, Any] | None = None,
) -> Stream[Any]:
    """This rank's part of the training batches."""
    return open_data(
        data,
        seed=seed,
        micro_batch=train.micro_batch(dist.world_size()),
        accumulate=train.accumulate,
        rank=dist.rank(),
        world=dist.world_size(),
        workers=workers,
        tokenize=tokenize,
        expect=expect,
    )


def is_model(folder: Path) -> bool:
    """Whether a folder is a model, one of its parts, or an adapter with its base's name."""
    return any(
        (folder / n).is_file() for n in ("model_index.json", ADAPTER, ABOUT, *(f"{p}config.json" for p in _PARTS))
    )


def place(source: str, key: str = "model") -> Path:
    """The folder of a shipped model's name, of a run's export, or of a path.

    Raises ValueError when there is none, and names what is in a folder that is no model.
    """
    folder = locate(source)
    if is_model(folder):
        return folder
    if is_model(folder / "export"):
        return folder / "export"
    raise ValueError(f"{key} {source!r}: no model in this folder: {seen(folder)}")


def seen(folder: Path) -> str:
    """What is in a folder that is no model, in words."""
    if (folder / "manifest.json").is_file():
        return "it is a data set, which data.path takes"
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if not p.name.startswith("."))
    if any(name.startswith("round-") for name in names):
        return f"it holds the rounds of a progressive distillation ({', '.join(names[:6])}), each a run of its own"
    if (folder / "config.yaml").is_file():
        return "it is a run that has written no export"
    return f"it holds {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else "it is empty"


def network_of(source: str) -> AnyNetwork:
    """The settings of a model's network, without reading its weights; of the base's, for an adapter."""
    folder = _below(source)
    if (folder / ADAPTER).is_file():
        return network_of(json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base"])
    if (own := network_in(folder)) is not None:
        return open_network(own)[0]
    return convert.open_model(folder if folder.exists() else source).network_config


def vae_of(source: str) -> AutoencoderConfig:
    """The settings of a model's autoencoder, without reading its weights."""
    folder = _below(source)
    if (folder / "vae").is_dir():
        return open_vae(folder / "vae")[0]
    return convert.open_model(folder if folder.exists() else source).vae_config


def scheduler_of(source: str) -> dict[str, Any]:
    """A model's `scheduler_config.json` as it is; the base's, for an adapter."""
    folder = _below(source)
    if (folder / ADAPTER).is_file():
        return scheduler_of(json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base"])
    return dict(convert.open_model(folder if folder.exists() else source).scheduler)


def load_network(source: str) -> Network:
    """The network of a model, an adapter merged into its weights."""
    folder = _below(source)
    if (own := network_in(folder)) is not None:
        return convert.load_network(own)
    return TextToImage.load(source).network.requires_grad_(True)


def _below(source: str) -> Path:
    folder = named(source)
    return folder / "export" if is_model(folder / "export") and not is_model(folder) else folder


def load_autoencoder(source: str) -> Autoencoder:
    """A frozen autoencoder, from its own folder or from one that holds `vae/`."""
    folder = place(source, "vae")
    autoencoder = convert.load_autoencoder(folder / "vae" if (folder / "vae").is_dir() else folder)
    return autoencoder.requires_grad_(False).eval()


def load_towers(source: str, precision: TextPrecision = "fp32") -> list[TextEncoder]:
    """Frozen text encoders: all of a diffusers folder, or the one tower of a CLIP trained here.

    Raises ValueError for a precision that they cannot have.
    """
    folder = place(source, "text")
    check_text_precision(precision)
    if (folder / "text_encoder_2").is_dir() or (folder / "transformer").is_dir():
        opened = convert.open_model(folder)
        check_text_precision(precision, [one.config for one in opened.text])
        return [load_encoder(one, precision, f"{opened.where}: text encoder") for one in opened.text]
    home = text_home(folder)
    if (home / "text_encoder").is_dir():
        tower = convert.load_text(home / "text_encoder", home / "tokenizer")
    else:
        tower = clip_tower(source)
    check_text_precision(precision, [tower.config])
    return [tower.to(text_dtype(precision))]


def load_clip(source: str) -> tuple[nn.Module, AnyClip]:
    """A frozen CLIP of both towers, from its own folder, one that holds `clip/`, or `open_clip:ARCH:WEIGHTS`."""
    if source.startswith(openclip.PREFIX):
        return openclip.load(source.removeprefix(openclip.PREFIX))
    folder = place(source)
    folder = folder / "clip" if (folder / "clip").is_dir() else folder
    plain, weights = read_module(folder)
    elsewhere = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_text")
    if elsewhere is not None:  # the text tower is stored once, in the pipeline's folder beside this one
        text = convert.load_text(folder / elsewhere / "text_encoder", folder / elsewhere / "tokenizer")
        weights |= text.model.state_dict()
    config = decode(ClipConfig, plain, f"{folder}: config.json")
    clip = build_clip(config)
    clip.load_state_dict(weights, strict=True)
    return clip.requires_grad_(False).eval(), config


def load_image_encoder(source: str) -> ImageEncoder:
    """A frozen image encoder: transformers' folder of one, or the image tower of what `load_clip` takes.

    Raises ValueError where there is none.
    """
    folder = named(source)
    if is_image_encoder(folder):
        return vision.load_image_encoder(folder)
    return of_clip(*load_clip(source), name=source)


def clip_tower(source: str) -> TextTower:
    """The text tower of a CLIP of ours."""
    clip, config = load_clip(source)
    if not isinstance(config, ClipConfig):
        raise ValueError(f"{source}: an open_clip model judges pictures; it is no text tower of a model here")
    return TextTower.of_clip(clip, config.text)  # type: ignore[arg-type]


def text_encoder(towers: Sequence[TextEncoder]) -> EncodeText:
    """Prompts -> Cond by all towers, without gradients."""

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> Cond:
        return encode_texts(towers, prompts)

    return encode


def weights_hash(*modules: nn.Module) -> str:
    """A short hash of all weights, the same on every machine; what a cache was made with."""
    total = hashlib.blake2b(digest_size=8)
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            total.update(name.encode())
            total.update(_bytes(value))
    return total.hexdigest()


def cache_hashes(autoencoder: Autoencoder | None = None, towers: Sequence[TextEncoder] | None = None) -> dict[str, str]:
    """What a cache must have been made with: weights, and the text's tokens and layers, which weights do not tell."""
    told = {} if autoencoder is None else {"vae": weights_hash(autoencoder)}
    if towers is not None:
        told |= {"text": weights_hash(*towers), "text_settings": text_settings(towers)}
    return told


_PROBES = ("", "a photo of a cat", "Zwölf GROSSE Äpfel, 12.5 % (sehr) süß!", "a red apple on a table, " * 40)


def text_settings(towers: Sequence[TextEncoder]) -> str:
    """A short hash of what decides text states beside the weights: how a few texts become tokens, and which layer."""
    return hashlib.blake2b(json.dumps([_text_told(t) for t in towers]).encode(), digest_size=8).hexdigest()


def _text_told(encoder: TextEncoder) -> list[Any]:
    config = encoder.config
    if isinstance(config, MissingConfig):
        return [config.kind, config.width, config.tokens]
    tokens = encoder.tokenize(list(_PROBES)).tolist()
    dtype = encoder.table.weight.dtype
    computed = [] if dtype == torch.float32 else [str(dtype)]  # weights may be the same in several
    if isinstance(config, TextConfig):
        return [config.output, config.activation, config.heads, tokens, *computed]
    plain = {k: v for k, v in encode(config).items() if k != "tokenizer"}  # a path; its tokens tell it
    if plain.get("padding") == "unmodified":  # as before there was a choice
        del plain["padding"]
    return [plain, tokens, *computed]


def _bytes(value: Tensor) -> bytes:
    value = value.detach().cpu().contiguous()
    return (value.float() if value.is_floating_point() else value).numpy().tobytes()
