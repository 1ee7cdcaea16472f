"""The one table of families of transformers: complete, and no family's marks are another's."""

from __future__ import annotations

import pytest

from ldm.checkpoint import lora_families
from ldm.checkpoint.families import FILES
from ldm.checkpoint.opened import shapes_of
from ldm.checkpoint.pairs import to_authors
from ldm.models import presets
from ldm.models.networks import NETWORKS
from ldm.models.transformers import presets as transformers
from ldm.models.unet import UNetConfig

TINY = {
    "sd3": transformers.SD3_TINY,
    "flux": transformers.FLUX_TINY,
    "pixart": transformers.PIXART_TINY,
    "zimage": transformers.ZIMAGE_TINY,
}


def test_every_network_but_the_unet_is_a_family_of_its_kind() -> None:
    assert {files.config for files in FILES.values()} == set(NETWORKS) - {UNetConfig}
    assert {kind: files.config().kind for kind, files in FILES.items()} == {kind: kind for kind in FILES}
    classes = [name for files in FILES.values() for name in (*files.pipelines, *files.network)]
    assert len(set(classes)) == len(classes)


@pytest.mark.parametrize("kind", FILES)
def test_the_mark_of_a_file_is_one_familys(kind: str) -> None:
    names = set(to_authors(FILES[kind].pairs(TINY[kind])))
    assert [other for other, files in FILES.items() if files.mark in names] == [kind]


@pytest.mark.parametrize("kind", FILES)
def test_the_layers_of_lora_files_are_the_files_own(kind: str) -> None:
    """The table of a family's LoRA files names the layers of its single files, and holds all that are made of them."""
    files, config = FILES[kind], TINY[kind]
    pairs, table = files.pairs(config), files.layers(config)
    both = {p.other.removesuffix(".weight"): p for p in pairs if p.other.endswith(".weight")}
    for name, pair in both.items():
        layer = table[name]
        assert [f"{part}.weight" for part in layer.parts] == list(pair.natives), name
        assert (layer.rows or ()) == pair.rows, name
        assert layer.swapped == pair.swapped, name
    natives = {n for p in pairs for n in p.natives}
    assert natives == set(shapes_of(config))
    assert all(f"{part}.weight" in natives for name, layer in table.items() for part in layer.parts if name in both)


@pytest.mark.parametrize("kind", FILES)
def test_the_names_of_a_lora_file_tell_its_family(kind: str) -> None:
    files, config = FILES[kind], TINY[kind]
    down = {f"lora_unet_{name.replace('.', '_')}.lora_down.weight": 64 for name in files.layers(config)}
    others = [c for other, c in TINY.items() if other != kind] + [presets.UNETS["sd15"]]
    assert lora_families.foreign(down, config) == ""
    assert all(f"those of {files.title}" in lora_families.foreign(down, c) for c in others)


@pytest.mark.parametrize("kind", FILES)
def test_what_is_usual_is_a_preset(kind: str) -> None:
    files, config = FILES[kind], TINY[kind]
    assert files.autoencoder(config) in presets.AUTOENCODERS
    assert tuple(t.kind for t in files.texts(config, None)) == files.text
    assert len(files.encoders) == len(files.text) >= files.needed
