"""LoRA files of the transformers: fused layers both ways, alpha, other kinds, names of other tools, other families."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.adapters.low_rank import Lora, Loras, LowRank
from ldm.adapters.sites import all_sites, network_sites
from ldm.checkpoint.lora_files import is_lora, kohya_holds, read_adapter, read_lora, write_lora
from ldm.models.network import Network
from ldm.models.presets import UNETS
from ldm.models.text import TextTower
from ldm.models.transformers import presets
from ldm.models.transformers.flux import FluxTransformer
from ldm.models.transformers.pixart import PixArtTransformer
from ldm.models.transformers.sd3 import SD3Transformer
from ldm.models.transformers.zimage import ZImageTransformer
from ldm.models.unet import UNet
from tests.unit.adapters.test_lora import TEXT, model
from tests.unit.adapters.test_lora_transformers import NETS, made

SINGLE = "single_transformer_blocks.0."
LINEAR1 = [f"transformer.{SINGLE}{n}" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
QKV = [f"transformer.transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v")]
D = 32


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def random_lora(network: Network, *, shared: bool, only: tuple[str, ...] = ("",)) -> Lora:
    """Corrections of all layers with names that end so; with `shared`, one `down` for each input width."""
    found = {}
    for seed, site in enumerate(network_sites(network)):
        if not site.name.endswith(only):
            continue
        out, *rest = site.read().shape
        rank = 2 if shared else 1 + seed % 3
        down = draw(rank, *rest, seed=0 if shared else seed)
        up = draw(out, rank, *[1] * (len(rest) - 1), seed=seed)
        found[site.name] = LowRank(down, up, 3.0 if shared else 1.0 + seed % 4)
    return found


def same(one: Any, other: Any, network: Network) -> None:
    sites = all_sites(network, [])
    assert set(one) == set(other)
    for name in one:
        weight = sites[name].read()
        assert torch.allclose(one[name].delta(weight), other[name].delta(weight), atol=1e-6), name


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["sd3", "flux", "zimage"])
def test_written_and_read_again(family: str, form: Any, shared: bool, tmp_path: Path) -> None:
    network = made(family)
    lora = random_lora(network, shared=shared)
    write_lora(tmp_path / "x.safetensors", lora, network.config, form=form)
    found = read_lora(tmp_path / "x.safetensors", network, [])
    same(found, lora, network)
    assert {n: low.rank for n, low in found.items()} == {n: low.rank for n, low in lora.items()}


def test_pixart_written_and_read_again(tmp_path: Path) -> None:
    network = made("pixart")
    lora = random_lora(network, shared=False)
    write_lora(tmp_path / "x.safetensors", lora, network.config)
    same(read_lora(tmp_path / "x.safetensors", network, []), lora, network)
    assert not kohya_holds(lora, tmp_path / "y.safetensors", network.config)
    with pytest.raises(ValueError, match="kohya's scripts know no PixArt; write form 'diffusers'"):
        write_lora(tmp_path / "y.safetensors", lora, network.config, form="kohya")


def test_the_layout_of_joined_layers(tmp_path: Path) -> None:
    """One `down`: as kohya trains it. Several: ranks beside each other and blocks, as its `split_qkv` writes them."""
    network = made("flux")
    for shared in (True, False):
        lora = random_lora(network, shared=shared)
        write_lora(tmp_path / "x.safetensors", lora, network.config, form="kohya")
        file = load_file(tmp_path / "x.safetensors")
        up, down = (file[f"lora_unet_single_blocks_0_linear1.lora_{k}.weight"] for k in ("up", "down"))
        ranks = [lora[n].rank for n in LINEAR1]
        assert up.shape == (7 * D, 2 if shared else sum(ranks))
        assert down.shape == (len(up.T), D)
        if not shared:
            corner = up[: 3 * D, ranks[0] + ranks[1] + ranks[2] :]
            assert not corner.any()
            assert torch.equal(down[: ranks[0]], lora[LINEAR1[0]].down)
        scale = float(file["lora_unet_single_blocks_0_linear1.alpha"]) / len(down)
        wanted = torch.cat([lora[n].change() for n in LINEAR1])
        assert torch.allclose(scale * up.double() @ down.double(), wanted, atol=1e-6)


def test_kohyas_names_and_header(tmp_path: Path) -> None:
    """As sd-scripts' networks/lora_flux.py and lora_sd3.py name modules and their headers; towers are te1 and te2."""
    tower = TextTower(TEXT)
    text = {
        f"{c}.text_model.encoder.layers.0.mlp.fc1": LowRank(draw(1, 16), draw(64, 1), 1.0)
        for c in ("text_encoder", "text_encoder_2")
    }
    for family, some, module, base in (
        ("flux", {"double_blocks_1_txt_mod_lin", "single_blocks_1_linear2", "single_blocks_0_modulation_lin",
                  "img_in", "time_in_in_layer", "final_layer_adaLN_modulation_1"}, "networks.lora_flux", "flux1"),
        ("sd3", {"joint_blocks_0_x_block_attn2_qkv", "joint_blocks_2_context_block_adaLN_modulation_1",
                 "joint_blocks_1_context_block_mlp_fc1", "x_embedder_proj"}, "networks.lora_sd3", "3-5-medium"),
    ):  # fmt: skip
        network = made(family)
        lora = {**random_lora(network, shared=True), **text}
        write_lora(tmp_path / "x.safetensors", lora, network.config, form="kohya")
        layers = {k.partition(".")[0] for k in load_file(tmp_path / "x.safetensors")}
        assert {f"lora_unet_{n}" for n in some} <= layers
        assert {f"lora_te{k}_text_model_encoder_layers_0_mlp_fc1" for k in (1, 2)} <= layers
        with safe_open(tmp_path / "x.safetensors", "pt") as handle:
            notes = handle.metadata()
        assert (notes["ss_network_module"], notes["ss_base_model_version"]) == (module, base)
        assert is_lora(tmp_path / "x.safetensors")
        back = read_lora(tmp_path / "x.safetensors", network, [tower, TextTower(TEXT)])
        assert set(text) <= set(back)


def test_some_parts_of_a_fused_layer(tmp_path: Path) -> None:
    """The rows of those that are not corrected are zero."""
    network = made("sd3")
    lora = random_lora(network, shared=False, only=("attn.to_q", "attn.to_v"))
    write_lora(tmp_path / "x.safetensors", lora, network.config, form="kohya")
    up = load_file(tmp_path / "x.safetensors")["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"]
    assert not up[D : 2 * D].any()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    loras = Loras(network, [])
    loras.add("x", read_lora(tmp_path / "x.safetensors", network, []))
    for name, value in network.state_dict().items():
        touched = name.endswith(("attn.to_q.weight", "attn.to_v.weight"))
        assert torch.equal(value, before[name]) != touched, name
    loras.remove()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def merged(tmp_path: Path, file: dict[str, Tensor], network: Network, names: list[str]) -> tuple[Tensor, Tensor]:
    """The weights of some sites one below the other, before and after, float64."""
    save_file({k: v.contiguous() for k, v in file.items()}, tmp_path / "x.safetensors")
    sites = all_sites(network, [])
    before = torch.cat([sites[n].read() for n in names]).double()
    Loras(network, []).add("x", read_lora(tmp_path / "x.safetensors", network, []))
    return before, torch.cat([sites[n].read() for n in names]).double()


KEY = "lora_unet_double_blocks_0_img_attn_qkv"


def test_lokr_loha_dora_and_differences_of_a_fused_layer(tmp_path: Path) -> None:
    """LyCORIS on sd-scripts' FLUX: the factors' rows (36) do not end where q, k and v (32) do."""
    w1, w2 = draw(4, 2), draw(24, 16)
    before, after = merged(tmp_path, {f"{KEY}.lokr_w1": w1, f"{KEY}.lokr_w2": w2}, made("flux"), QKV)
    assert torch.allclose(after - before, torch.kron(w1, w2).double(), atol=1e-6)
    parts = [draw(96, 2), draw(2, D, seed=1), draw(96, 2, seed=2), draw(2, D, seed=3)]
    file = {f"{KEY}.hada_{n}": p for n, p in zip(("w1_a", "w1_b", "w2_a", "w2_b"), parts, strict=True)}
    before, after = merged(tmp_path, file | {f"{KEY}.alpha": torch.tensor(4.0)}, made("flux"), QKV)
    assert torch.allclose(after - before, 2 * ((parts[0] @ parts[1]) * (parts[2] @ parts[3])).double(), atol=1e-6)
    before, after = merged(tmp_path, {f"{KEY}.diff": draw(96, D)}, made("flux"), QKV)
    assert torch.allclose(after - before, draw(96, D).double(), atol=1e-6)
    up, down, size = draw(96, 2), draw(2, D), 1 + draw(96).abs()
    file = {f"{KEY}.lora_up.weight": up, f"{KEY}.lora_down.weight": down}
    before, after = merged(tmp_path, file | {f"{KEY}.dora_scale": size[:, None]}, made("flux"), QKV)
    total = before + (up @ down).double()
    assert torch.allclose(after, total * (size.double() / total.norm(dim=1))[:, None], atol=1e-6)
    lokr = {f"{KEY}.lokr_w1": w1, f"{KEY}.lokr_w2": w2, f"{KEY}.dora_scale": size[:, None]}
    before, after = merged(tmp_path, lokr, made("flux"), QKV)
    total = before + torch.kron(w1, w2).double()
    assert torch.allclose(after, total * (size.double() / total.norm(dim=1))[:, None], atol=1e-6)
    with pytest.raises(ValueError, match="magnitudes by input column of a layer that is several here"):
        merged(tmp_path, file | {f"{KEY}.dora_scale": torch.ones(1, D)}, made("flux"), QKV)
    with pytest.raises(ValueError, match=r"shape \(90, 32\), the model's is \(96, 32\)"):
        merged(tmp_path, file | {f"{KEY}.lora_up.weight": draw(90, 2)}, made("flux"), QKV)


def test_biases_and_norms_of_the_authors(tmp_path: Path) -> None:
    """ComfyUI's diff_b of a fused layer, and a norm that BFL's control LoRA replaces."""
    network = made("flux")
    file = {f"{KEY}.diff_b": draw(96), "double_blocks.1.txt_attn.norm.key_norm.scale": draw(16)}
    before = {k: v.clone() for k, v in network.state_dict().items()}
    save_file(file, tmp_path / "x.safetensors")
    Loras(network, []).add("x", read_lora(tmp_path / "x.safetensors", network, []))
    after = network.state_dict()
    for i, n in enumerate(("to_q", "to_k", "to_v")):
        name = f"transformer_blocks.0.attn.{n}.bias"
        assert torch.allclose(after[name], before[name] + draw(96)[i * D : (i + 1) * D])
    assert torch.allclose(after["transformer_blocks.1.attn.norm_added_k.weight"], draw(16))


FORMS = {  # tool: a layer's name as it writes it, the ends of down and up, our layer
    "ai-toolkit": ("transformer.single_transformer_blocks.1.proj_mlp", ("lora_A.weight", "lora_B.weight"),
                   "single_transformer_blocks.1.proj_mlp"),
    "PEFT": ("base_model.model.transformer_blocks.1.attn.to_out.0", ("lora_A.weight", "lora_B.weight"),
             "transformer_blocks.1.attn.to_out.0"),
    "fal": ("base_model.model.double_blocks.1.img_mlp.2", ("lora_A.weight", "lora_B.weight"),
            "transformer_blocks.1.ff.net.2"),
    "TheLastBen": ("lora_unet_single_transformer_blocks_1_proj_out_", ("lora_down.weight", "lora_up.weight"),
                   "single_transformer_blocks.1.proj_out"),
    "OneTrainer": ("lora_transformer_transformer_blocks_1_ff_context_net_0_proj",
                   ("lora_down.weight", "lora_up.weight"), "transformer_blocks.1.ff_context.net.0.proj"),
    "OneTrainer OMI": ("transformer.double_blocks.1.txt_attn.qkv.2", ("lora_down.weight", "lora_up.weight"),
                       "transformer_blocks.1.attn.add_v_proj"),
    "OneTrainer OMI, single": ("transformer.single_blocks.0.linear1.3", ("lora_down.weight", "lora_up.weight"),
                               "single_transformer_blocks.0.proj_mlp"),
    "ComfyUI": ("diffusion_model.double_blocks.0.txt_mod.lin", ("lora_A.weight", "lora_B.weight"),
                "transformer_blocks.0.norm1_context.linear"),
    "old diffusers": ("transformer.transformer_blocks.0.attn.to_k", ("lora.down.weight", "lora.up.weight"),
                      "transformer_blocks.0.attn.to_k"),
}  # fmt: skip


@pytest.mark.parametrize("tool", FORMS)
def test_names_of_other_tools(tool: str, tmp_path: Path) -> None:
    """Published names: huggingface/diffusers lora_conversion_utils, Comfy-Org/ComfyUI#4347, OMI's convert_flux_lora."""
    theirs, (down, up), ours = FORMS[tool]
    network = made("flux")
    out, into = network.get_submodule(ours).weight.shape  # type: ignore[union-attr, misc]
    file = {f"{theirs}.{down}": draw(2, into), f"{theirs}.{up}": draw(out, 2), f"{theirs}.alpha": torch.tensor(1.0)}
    before, after = merged(tmp_path, file, network, [f"transformer.{ours}"])
    assert torch.allclose(after - before, 0.5 * (draw(out, 2) @ draw(2, into)).double(), atol=1e-6)


def test_lokr_of_simpletuner_and_dora_of_onetrainer(tmp_path: Path) -> None:
    """SimpleTuner's `lycoris_` (vladmandic/sdnext#3405) and OneTrainer's dora_scale by columns, on single layers."""
    name = "transformer.transformer_blocks.0.attn.to_q"
    key, w1, w2 = "lycoris_transformer_blocks_0_attn_to_q", draw(4, 2), draw(8, 16)
    before, after = merged(tmp_path, {f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2}, made("sd3"), [name])
    assert torch.allclose(after - before, torch.kron(w1, w2).double(), atol=1e-6)
    key, size = "lora_transformer_transformer_blocks_0_attn_to_q", 1 + draw(1, D).abs()
    file = {f"{key}.lora_down.weight": draw(2, D), f"{key}.lora_up.weight": draw(D, 2), f"{key}.dora_scale": size}
    before, after = merged(tmp_path, file, made("sd3"), [name])
    total = before + (draw(D, 2) @ draw(2, D)).double()
    assert torch.allclose(after, total * size.double() / total.norm(dim=0), atol=1e-6)


def test_a_folder_of_peft(tmp_path: Path) -> None:
    """PixArt's scripts save PEFT's folder (`transformer_lora`), whose settings tell the scale."""
    network = made("pixart")
    site = "transformer_blocks.0.attn2.to_k"
    file = {
        f"base_model.model.{site}.lora_A.weight": draw(2, 24),
        f"base_model.model.{site}.lora_B.weight": draw(24, 2),
    }
    save_file(file, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    found = read_lora(tmp_path, network, [])[f"transformer.{site}"]
    assert torch.allclose(found.change(), 3 * (draw(24, 2) @ draw(2, 24)).double(), atol=1e-6)


def test_pixarts_own_names(tmp_path: Path) -> None:
    """As OMI's convert_pixart_lora has them: key and value of the text are one layer."""
    network, key = made("pixart"), "diffusion_model.blocks.1.cross_attn.kv_linear"
    file = {f"{key}.lora_up.weight": draw(48, 2), f"{key}.lora_down.weight": draw(2, 24)}
    names = [f"transformer.transformer_blocks.1.attn2.{n}" for n in ("to_k", "to_v")]
    before, after = merged(tmp_path, file, network, names)
    assert torch.allclose(after - before, (draw(48, 2) @ draw(2, 24)).double(), atol=1e-6)


def files_of_all(tmp_path: Path) -> dict[str, Path]:
    """A file of each family, as their real widths and names have them."""
    with torch.device("meta"):
        nets: dict[str, Network] = {
            "Stable Diffusion 1": UNet(UNETS["sd15"]),
            "Stable Diffusion XL": UNet(UNETS["sdxl"]),
            "Stable Diffusion 3": SD3Transformer(
                replace(presets.SD35_MEDIUM, num_layers=1, dual_attention_layers=(0,))
            ),
            "FLUX.1": FluxTransformer(replace(presets.FLUX_DEV, num_layers=1, num_single_layers=1)),
            "PixArt": PixArtTransformer(replace(presets.PIXART_SIGMA, num_layers=1)),
            "Z-Image": ZImageTransformer(replace(presets.ZIMAGE, n_layers=1, n_refiner_layers=1)),
        }
    found = {}
    for title, network in nets.items():
        for form in ("diffusers", "kohya") if title != "PixArt" else ("diffusers",):
            sites = [s for s in network_sites(network) if s.name.endswith((".to_q", ".to_k"))][:8]
            lora = {s.name: LowRank(torch.ones(1, s.read().shape[1]), torch.ones(len(s.read()), 1), 1.0) for s in sites}
            found[f"{title}, {form}"] = tmp_path / f"{title} {form}.safetensors"
            write_lora(found[f"{title}, {form}"], lora, network.config, form=form)  # type: ignore[arg-type]
    return found


def test_a_lora_of_another_family_is_told_in_one_line(tmp_path: Path) -> None:
    own = {"Stable Diffusion 1": model()[0]} | {
        title: NETS[kind]() for title, kind in
        (("Stable Diffusion 3", "sd3"), ("FLUX.1", "flux"), ("PixArt", "pixart"), ("Z-Image", "zimage"))
    }  # fmt: skip
    for title, path in files_of_all(tmp_path).items():
        told = title.partition(",")[0]
        for name, network in own.items():
            with pytest.raises(ValueError) as caught:
                read_lora(path, network, [], lenient=True)
            message = str(caught.value)
            assert "\n" not in message
            assert "fits this model" in message
            assert (f"its names are those of {told}, the model is {name}" in message) == (told != name), message


def test_t5_is_refused_or_left_out_where_there_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = made("flux")
    file = {f"{KEY}.lora_up.weight": draw(96, 2), f"{KEY}.lora_down.weight": draw(2, D)}
    t5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    file |= {f"{t5}.lora_up.weight": draw(8, 2), f"{t5}.lora_down.weight": draw(2, 8)}
    save_file(file, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"2 of 4 tensors fit.*lora_te3.*this model has no T5 that it fits"):
        read_lora(tmp_path / "x.safetensors", network, [])
    with caplog.at_level(logging.WARNING):
        found = read_adapter(tmp_path / "x.safetensors", network, [nn.Linear(1, 1)], lenient=True)  # type: ignore[list-item]
    assert set(found.corrections) == set(QKV)
    assert "lora_te3" in caplog.text


def test_one_layer_under_two_names(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn.to_q"
    file = {f"{KEY}.lora_up.weight": draw(96, 2), f"{KEY}.lora_down.weight": draw(2, D)}
    file |= {f"{name}.lora_A.weight": draw(2, D), f"{name}.lora_B.weight": draw(D, 2)}
    save_file(file, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"corrects transformer\..*to_q, which is there under another name too"):
        read_lora(tmp_path / "x.safetensors", made("flux"), [])
