"""What we write for others' tools, read by the rules that these publish: kohya's scripts and ComfyUI."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.adapters.corrections import Correction, Difference, Hadamard, Kronecker
from ldm.adapters.low_rank import Lora, LowRank, as_plain
from ldm.adapters.sites import Site, all_sites
from ldm.checkpoint.lora_files import kohya_holds, kohya_names, read_lora, write_lora
from tests.unit.adapters.test_lora import model

OWN = (
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.attentions.0.proj_in",
    "unet.down_blocks.0.resnets.0.conv1",
    "unet.down_blocks.0.resnets.0.time_emb_proj",
    "unet.down_blocks.0.downsamplers.0.conv",
    "unet.up_blocks.0.resnets.0.conv_shortcut",
    "unet.up_blocks.0.upsamplers.0.conv",
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
)
NOT_OWN = ("unet.conv_in", "unet.conv_out", "unet.time_embedding.linear_1", "unet.time_embedding.linear_2")


def kohya_reads(file: Mapping[str, Tensor], sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """The changes that kohya's scripts take: of their own layers, alpha / rank times up down, no magnitudes."""
    unet, _ = model()
    found = {}
    for site, key in kohya_names([s for s in sites if s in OWN], unet.config).items():
        if f"{key}.lora_up.weight" in file:
            up, down = (file[f"{key}.lora_{k}.weight"].double().flatten(1) for k in ("up", "down"))
            found[site] = (float(file[f"{key}.alpha"]) / len(down) * up @ down).view(sites[site].read().shape)
    return found


def comfyui_reads(file: Mapping[str, Tensor], sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """Those that ComfyUI takes: of every layer, and by row magnitudes over the norm of the weight as it was."""
    unet, _ = model()
    found = {}
    for site, key in kohya_names(list(sites), unet.config).items():
        if f"{key}.lora_up.weight" not in file:
            continue
        base = sites[site].read().double()
        up, down = (file[f"{key}.lora_{k}.weight"].double().flatten(1) for k in ("up", "down"))
        total = base + (float(file[f"{key}.alpha"]) / len(down) * up @ down).view(base.shape)
        if f"{key}.dora_scale" in file:
            norm = base.flatten(1).norm(dim=1).view(-1, *[1] * (base.ndim - 1))
            total = total * file[f"{key}.dora_scale"].double() / norm
        found[site] = total - base
    return found


def sites_of_model() -> dict[str, Site]:
    unet, tower = model()
    return all_sites(unet, [tower])


def random_lora(names: tuple[str, ...], sites: Mapping[str, Site], dora: bool) -> Lora:
    g, found = torch.Generator().manual_seed(5), {}
    for name in names:
        base = sites[name].read()
        down = 0.3 * torch.randn(2, *base.shape[1:], generator=g)
        up = 0.3 * torch.randn(len(base), 2, *[1] * (base.ndim - 2), generator=g)
        size = base.flatten(1).norm(dim=1) * (1 + 0.2 * torch.rand(len(base), generator=g))
        found[name] = LowRank(down, up, 3.0, size if dora else None)
    return found


def off(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Relative error over all layers."""
    wrong = sum(float((found[n] - wanted[n]).square().sum()) for n in wanted)
    return (wrong / sum(float(w.square().sum()) for w in wanted.values())) ** 0.5


def test_a_dora_is_what_its_readers_see(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sites = sites_of_model()
    lora = random_lora(OWN, sites, dora=True)
    wanted = {n: low.delta(sites[n].read()) for n, low in lora.items()}
    unet, _ = model()
    with caplog.at_level(logging.WARNING):
        write_lora(tmp_path / "x.safetensors", lora, unet.config, form="kohya", sites=sites)
    file = load_file(tmp_path / "x.safetensors")
    assert not [k for k in file if "dora" in k]
    assert off(kohya_reads(file, sites), wanted) < 1e-6  # these small layers have no more than 64 singular values
    assert off(comfyui_reads(file, sites), wanted) < 1e-6
    assert "10 layers of DoRA, LoHa, LoKr or OFT are written as plain products of rank 64 at most" in caplog.text
    with pytest.raises(ValueError, match="needs the base's weights"):
        write_lora(tmp_path / "y.safetensors", lora, unet.config, form="kohya")


def test_a_fit_of_a_lower_rank_says_its_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sites = sites_of_model()
    lora = random_lora(OWN, sites, dora=True)
    wanted = {n: low.delta(sites[n].read()) for n, low in lora.items()}
    unet, _ = model()
    with caplog.at_level(logging.WARNING):
        write_lora(tmp_path / "x.safetensors", lora, unet.config, form="kohya", sites=sites, rank=3)
    error = off(kohya_reads(load_file(tmp_path / "x.safetensors"), sites), wanted)
    best = sum(float(torch.linalg.svdvals(w.flatten(1))[3:].square().sum()) for w in wanted.values())
    best = (best / sum(float(w.square().sum()) for w in wanted.values())) ** 0.5
    assert abs(error - best) < 1e-5  # Eckart-Young
    assert f"relative error of the change {best:.2g}" in caplog.text


def test_layers_that_kohya_ignores_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sites = sites_of_model()
    unet, _ = model()
    lora = random_lora(OWN + NOT_OWN, sites, dora=False)
    with caplog.at_level(logging.WARNING):
        write_lora(tmp_path / "x.safetensors", lora, unet.config, form="kohya")
    file = load_file(tmp_path / "x.safetensors")
    assert {k.rpartition(".lora_")[0] for k in file if ".lora_" in k} == set(kohya_names(OWN, unet.config).values())
    wanted = {n: lora[n].delta(sites[n].read()) for n in OWN}
    assert off(kohya_reads(file, sites), wanted) < 1e-6
    assert all(name in caplog.text for name in NOT_OWN)
    rest = {n: lora[n] for n in NOT_OWN}
    assert not kohya_holds(rest, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="form 'kohya' holds none of these 4 layers"):
        write_lora(tmp_path / "y.safetensors", rest, unet.config, form="kohya")
    write_lora(tmp_path / "z.safetensors", lora, unet.config)  # diffusers' form holds them all
    assert sum(".lora_A." in k for k in load_file(tmp_path / "z.safetensors")) == len(lora)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_other_kinds_as_plain_products(form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sites, (unet, tower) = sites_of_model(), model()
    g = torch.Generator().manual_seed(1)
    draw = lambda *shape: 0.3 * torch.randn(*shape, generator=g)  # noqa: E731
    one, two, three = OWN[0], OWN[2], OWN[8]
    form_of = {n: tuple(sites[n].read().shape) for n in (one, two, three)}
    out, into = form_of[one]
    lora: dict[str, Correction] = {
        one: Hadamard(draw(out, 2), draw(2, into), draw(out, 2), draw(2, into), 0.7, form_of[one]),
        two: Kronecker(draw(2, 2), draw(form_of[two][0] // 2, form_of[two][1] // 2, 3, 3), 1.3, form_of[two]),
        three: LowRank(draw(2, 16), draw(16, 2), 2.0, 1 + draw(16).abs(), axis=1),
        "unet.conv_norm_out": Difference(draw(8)),
    }
    with caplog.at_level(logging.WARNING):
        write_lora(tmp_path / "x.safetensors", lora, unet.config, form=form, sites=sites)  # type: ignore[arg-type]
    found = read_lora(tmp_path / "x.safetensors", unet, [tower])
    assert set(found) == {one, two, three}
    for name in found:
        base = sites[name].read()
        assert torch.allclose(found[name].delta(base), lora[name].delta(base), atol=1e-6)
    assert "conv_norm_out" in caplog.text


def test_plain_ones_are_left_as_they_are() -> None:
    sites = sites_of_model()
    lora = random_lora(OWN[:3], sites, dora=False)
    found, errors = as_plain(lora, sites, 1)
    assert found == lora
    assert errors == {}
