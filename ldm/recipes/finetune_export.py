"""What a fine-tuning writes at its end: a diffusers folder, or the adapter's files and what they belong to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ldm.adapters.control import ControlAdapter
from ldm.adapters.corrections import Corrections
from ldm.adapters.full import FullAdapter
from ldm.adapters.image_prompt import ImagePromptAdapter
from ldm.adapters.lora import LoraAdapter
from ldm.adapters.low_rank import LowRank
from ldm.adapters.pivotal import PivotalAdapter
from ldm.adapters.sites import all_sites
from ldm.adapters.tokens import TokensAdapter
from ldm.checkpoint import embedding_files, files, lora_files
from ldm.checkpoint.control_files import save_control
from ldm.checkpoint.convert import save_diffusers
from ldm.checkpoint.ip_adapter_files import About, save_ip_adapter
from ldm.checkpoint.lycoris_files import peft_holds, write_lycoris, write_peft
from ldm.models.concat import config_of
from ldm.models.concat import widened as wide
from ldm.models.text import TextEncoder, TextTower
from ldm.objectives.concat import Concat
from ldm.pipeline import TextToImage
from ldm.recipes import concat
from ldm.recipes.sources import scheduler_of
from ldm.recipes.text_to_image import filled

AnyAdapter = FullAdapter | LoraAdapter | TokensAdapter | PivotalAdapter | ControlAdapter | ImagePromptAdapter
ADAPTER = "adapter.json"


def write_export(
    base: str, adapter: AnyAdapter, weights: dict[str, Tensor], folder: Path, told: Concat | None = None
) -> None:
    """What others load: a diffusers folder for whole weights, else the adapter's files and what they belong to.

    `told`: the picture that a network is told by more channels.
    """
    if isinstance(adapter, ControlAdapter):
        save_control(folder, adapter.control.config, adapter.export(weights))
        return
    if isinstance(adapter, ImagePromptAdapter):
        about = About(base, adapter.encoder)
        save_ip_adapter(folder, adapter.adapter.config, adapter.export(weights), about)
        return
    fresh = TextToImage.load(base)
    if isinstance(adapter, FullAdapter):
        found = adapter.export(weights)
        own = f"{fresh.network.component}."
        network = {k.removeprefix(own): v for k, v in found.items() if k.startswith(own)}
        fresh.network = filled(wide(fresh.network, config_of(fresh.network.config, network)), network)
        for i, tower in enumerate(fresh.text):
            load_tower(tower, found, i)
        save_diffusers(
            folder, network=fresh.network, autoencoder=concat.exported(told, fresh.codec.autoencoder), text=fresh.text,
            scheduler=scheduler_of(base), augmentation=concat.augmentation(told),
        )  # fmt: skip
        return
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, list[str]] = {"loras": [], "embeddings": []}
    if isinstance(adapter, LoraAdapter | PivotalAdapter):
        names["loras"] = [_write_corrections(adapter.corrections(weights), fresh, folder)]
    if isinstance(adapter, TokensAdapter | PivotalAdapter):
        names["embeddings"] = _write_tokens(adapter, weights, folder, token_names(fresh.text))
    files.write_text(folder / ADAPTER, json.dumps({"base": base, **names}, indent=1))


def _write_corrections(found: Corrections, fresh: TextToImage, folder: Path) -> str:
    """Low-rank ones in diffusers' and kohya's forms, others in LyCORIS' and PEFT's; the name of the first file."""
    sites, config = all_sites(fresh.network, fresh.text), fresh.network.config
    if all(isinstance(low, LowRank) for low in found.values()):
        lora_files.write_lora(folder / lora_files.NAME, found, config)
        if lora_files.kohya_holds(found, folder / "kohya.safetensors", config):
            lora_files.write_lora(folder / "kohya.safetensors", found, config, form="kohya", sites=sites)
        return lora_files.NAME
    write_lycoris(folder / lora_files.LYCORIS, found, config, sites=sites)
    if peft_holds(found):
        write_peft(folder / "peft", found)
    return lora_files.LYCORIS


def token_names(text: Sequence[TextEncoder]) -> tuple[str, ...]:
    """What files call the rows of each encoder that reads tokens."""
    found = [one for one in text if next(one.parameters(), None) is not None]
    names = iter(("clip_l", "clip_g"))
    return tuple(next(names) if isinstance(one, TextTower) else "t5xxl" for one in found)


def _write_tokens(
    adapter: TokensAdapter | PivotalAdapter, weights: dict[str, Tensor], folder: Path, names: Sequence[str]
) -> list[str]:
    """All tokens in one file of diffusers' form where it can hold them, and each in A1111's."""
    concepts = adapter.concepts(weights)
    for token, rows in concepts.items():
        path = folder / "a1111" / f"{plain(token)}.safetensors"
        embedding_files.write_embeddings(path, {token: rows}, form="a1111", names=names)
    if all(len(rows) == 1 for rows in concepts.values()):
        embedding_files.write_embeddings(folder / embedding_files.NAME, concepts)
        return [embedding_files.NAME]
    return [f"a1111/{plain(token)}.safetensors" for token in concepts]


def plain(token: str) -> str:
    """A token as a file's name."""
    return "".join(c if c.isalnum() or c in "-_" else "" for c in token) or "token"


def load_tower(tower: TextEncoder, weights: dict[str, Tensor], index: int) -> None:
    """Give a tower the trained weights `text.INDEX.NAME`; those that did not train stay."""
    prefix = f"text.{index}."
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    tower.model.load_state_dict({**tower.model.state_dict(), **own}, strict=True)
