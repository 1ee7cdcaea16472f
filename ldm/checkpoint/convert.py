"""Models of any format we know: read them, write them, and turn one format into another tensor by tensor."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from ldm.checkpoint import weights
from ldm.checkpoint.folder import open_folder, open_network, open_vae, write_folder
from ldm.checkpoint.opened import Components, Opened, OpenedText, component, fill, load_encoder, shapes_of, title
from ldm.checkpoint.opened import empty as _empty
from ldm.checkpoint.single import open_single, write_single
from ldm.checkpoint.single_transformer import Given
from ldm.checkpoint.towers import open_text
from ldm.diffusion.augmentation import NoiseAugmentation
from ldm.models.network import Network
from ldm.models.networks import AnyNetwork
from ldm.models.shipped import SHIPPED
from ldm.models.text import Output, TextEncoder, TextTower
from ldm.models.unet import UNetConfig
from ldm.models.vae.autoencoder import Autoencoder, AutoencoderConfig
from ldm.words import expanded, near

__all__ = [
    "Components",
    "Opened",
    "OpenedText",
    "convert",
    "load_autoencoder",
    "load_diffusers",
    "load_model",
    "load_network",
    "load_single",
    "load_text",
    "open_model",
    "save_diffusers",
    "save_single",
]
log = logging.getLogger(__name__)
FORMATS = ("diffusers", "compvis", "single")
"""compvis and single are the same: one file, in the names of the family's authors."""
_HUB_FILES = ["*.json", "*.txt", "*.safetensors", "*.model", "*.jinja"]


def save_diffusers(
    folder: Path,
    *,
    network: Network,
    autoencoder: Autoencoder,
    text: Sequence[TextEncoder],
    scheduler: Mapping[str, Any],
    augmentation: NoiseAugmentation | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = weights.SHARD_BYTES,
) -> None:
    """Write a folder that diffusers' pipelines load, as `folder.write_folder`; `dtype` is that of the file."""
    model = Opened.of(network, autoencoder, text, scheduler, augmentation)
    write_folder(Path(folder), model, dtype=dtype, shard_bytes=shard_bytes)


def load_diffusers(folder: Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32) -> Components:
    """Read a folder written by us or by diffusers; weights become `dtype`."""
    return open_folder(Path(folder), variant=variant).fitted().load(dtype)


def save_single(
    path: Path,
    *,
    network: Network,
    autoencoder: Autoencoder,
    text: Sequence[TextEncoder],
    scheduler: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a CompVis single file."""
    write_single(Path(path), Opened.of(network, autoencoder, text, scheduler), dtype=dtype)


def load_single(
    path: Path, *, ema: bool = False, prediction: str | None = None, dtype: torch.dtype = torch.float32
) -> Components:
    """Read a CompVis or Stability single file; weights become `dtype`."""
    return open_single(Path(path), ema=ema, prediction=prediction).fitted().load(dtype)


def load_model(
    source: str | Path,
    *,
    variant: str | None = None,
    ema: bool = False,
    prediction: str | None = None,
    lenient: bool = False,
    text: str | Path | None = None,
    vae: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Components:
    """`open_model`, read: a diffusers folder, a single file or a hub id such as "stabilityai/stable-diffusion-2-1"."""
    options: dict[str, Any] = {"variant": variant, "ema": ema, "prediction": prediction, "lenient": lenient}
    return open_model(source, text=text, vae=vae, **options).load(dtype)


def open_model(
    source: str | Path,
    *,
    variant: str | None = None,
    ema: bool = False,
    prediction: str | None = None,
    lenient: bool = False,
    text: str | Path | None = None,
    vae: str | Path | None = None,
) -> Opened:
    """A diffusers folder, a single file or a hub id, without its weights; `lenient` leaves unknown tensors out.

    `text` is a diffusers folder with the text encoders, `vae` a folder or file with the autoencoder, that a single file
    of a transformer does not hold. Raises ValueError if the source is none of these, or a hub id that is neither stored
    here nor reachable.
    """
    path = Path(expanded(str(source)))
    given = Given(_there(text, "--text", folder=True), _there(vae, "--vae"))
    if path.is_file():
        if variant:
            raise ValueError(f"--variant: {variant!r} is of folders; {path.name} is one file")
        opened = open_single(path, ema=ema, prediction=prediction, lenient=lenient, given=given)
        return opened.fitted(lenient=lenient)
    if ema or prediction:
        what = f"--prediction: {prediction!r}" if prediction else "--ema"
        raise ValueError(f"{what}: is for single files; a folder's own files tell it")
    if given != Given():
        raise ValueError(f"{'--text' if given.text else '--vae'}: is for single files; a folder has all parts in it")
    if path.is_dir():
        return open_folder(path, variant=variant, lenient=lenient).fitted(lenient=lenient)
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix in (".safetensors", ".ckpt"):
        raise ValueError(f"{name}: no such file or folder, and not a hub id (owner/name){near(name, SHIPPED)}")
    return open_folder(from_hub(name), variant=variant, lenient=lenient).fitted(lenient=lenient)


def _there(given: str | Path | None, option: str, *, folder: bool = False) -> Path | None:
    if given is None:
        return None
    path = Path(expanded(str(given)))
    if not (path.is_dir() or (path.is_file() and not folder)):
        raise ValueError(f"{option} {str(given)!r}: no such folder{'' if folder else ' or file'}")
    return path


def from_hub(name: str) -> Path:
    """The folder of a hub id, from the hub's cache where there is no network. Raises ValueError if it is in neither."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, ConnectionError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
            raise ValueError(f"{name}: the hub refused: {str(error).splitlines()[0]}") from error
        raise ValueError(
            f"{name}: no such folder here, not in the hub's cache, and the hub cannot be reached; download it where "
            "there is a network and give its folder"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"{name}: not a hub id (owner/name)") from error


def load_network(folder: Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32) -> Network:
    """A denoising network from its own folder."""
    model = _read(Path(folder), *open_network(Path(folder), variant=variant), dtype)
    assert isinstance(model, Network)
    return model


def load_autoencoder(folder: Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """An autoencoder from its own folder."""
    model = _read(Path(folder), *open_vae(Path(folder), variant=variant), dtype)
    assert isinstance(model, Autoencoder)
    return model


def _read(folder: Path, config: AnyNetwork | AutoencoderConfig, source: weights.Source, dtype: torch.dtype) -> Module:
    """A part whose tensors must be those of its settings."""
    source = weights.reshaped(source, shapes_of(config))
    weights.check_keys(str(folder), shapes_of(config), weights.shapes(source))
    return fill(_empty(config), source, dtype, str(folder))


def load_text(
    folder: Path,
    tokenizer: Path,
    *,
    output: Output = "last",
    zero_empty: bool = False,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> TextTower:
    """A frozen text tower from HF `CLIPTextModel(WithProjection)` files."""
    opened = open_text(Path(folder), Path(tokenizer), output=output, zero_empty=zero_empty, variant=variant)
    weights.check_keys(str(folder), shapes_of(opened.config), weights.shapes(opened.source))
    tower = load_encoder(opened, dtype, str(folder))
    assert isinstance(tower, TextTower)
    return tower


def convert(
    source: str | Path,
    target: Path,
    to: str,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    ema: bool = False,
    prediction: str | None = None,
    lenient: bool = False,
    text: str | Path | None = None,
    vae: str | Path | None = None,
) -> dict[str, int]:
    """Read one format, write another, a tensor at a time; returns the number of tensors of each part.

    Raises ValueError for an unknown format, or a target that exists.
    """
    if to not in FORMATS:
        raise ValueError(f"format {to!r} is not one of {list(FORMATS)}")
    if target.exists():
        raise ValueError(f"{target}: exists already")
    options: dict[str, Any] = {"variant": variant, "ema": ema, "prediction": prediction, "lenient": lenient}
    model = open_model(source, text=text, vae=vae, **options).check()
    if to == "compvis" and not isinstance(model.network_config, UNetConfig):
        raise ValueError(f"format 'compvis' is for U-Nets; the file of the {title(model.network_config)} is 'single'")
    target.parent.mkdir(parents=True, exist_ok=True)
    if to in ("compvis", "single"):
        write_single(target, model, dtype=dtype)
    else:
        write_folder(target, model, dtype=dtype)
    counts = {component(model.network_config): len(model.network), "vae": len(model.vae)}
    return counts | {f"text {i + 1}": len(t.source) for i, t in enumerate(model.text)}
