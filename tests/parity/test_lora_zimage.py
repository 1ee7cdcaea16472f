"""LoRA files of Z-Image in the names of published tools: what diffusers makes of them is what we do.

For fused layers the oracle is diffusers' conversion of single files: the file's change added to the authors' weights,
and these converted.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.adapters.low_rank import Loras, LowRank
from ldm.adapters.sites import network_sites
from ldm.checkpoint.lora_files import read_lora, write_lora
from ldm.models.transformers import presets
from ldm.models.transformers.zimage import ZImageTransformer

torch.set_num_threads(1)
D, RANK = 48, 2
PLAIN = {
    "attention.to_q": (D, D), "attention.to_k": (D, D), "attention.to_v": (D, D), "attention.to_out.0": (D, D),
    "feed_forward.w1": (128, D), "feed_forward.w2": (D, 128), "feed_forward.w3": (128, D),
    "adaLN_modulation.0": (4 * D, D),
}  # fmt: skip
"""(out, in) of a block's layers under diffusers' names, as ai-toolkit, musubi-tuner and OneTrainer train them."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def made() -> ZImageTransformer:
    torch.manual_seed(0)
    network = ZImageTransformer(presets.ZIMAGE_TINY)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


FORMS = {  # a layer's name as a tool writes it, the ends of down and up, alpha
    "ai-toolkit": (lambda n: f"diffusion_model.{n}", ("lora_A.weight", "lora_B.weight"), None),
    "musubi-tuner": (lambda n: "lora_unet_" + n.replace(".", "_"), ("lora_down.weight", "lora_up.weight"), 1.0),
    "diffusers": (lambda n: f"transformer.{n}", ("lora_A.weight", "lora_B.weight"), None),
    "OneTrainer": (lambda n: "lora_transformer_" + n.replace(".", "_"), ("lora_down.weight", "lora_up.weight"), 1.0),
    "plain": (lambda n: n, ("lora_down.weight", "lora_up.weight"), 3.0),
    "PEFT": (lambda n: f"base_model.model.{n}", ("lora_A.weight", "lora_B.weight"), None),
}


def file_of(tool: str) -> dict[str, Tensor]:
    named, (down, up), alpha = FORMS[tool]
    file = {}
    for block in ("layers.1", "noise_refiner.0", "context_refiner.0"):
        for seed, (name, (out, into)) in enumerate(PLAIN.items()):
            if block.startswith("context") and "adaLN" in name:
                continue
            key = named(f"{block}.{name}")
            file |= {f"{key}.{down}": draw(RANK, into, seed=seed), f"{key}.{up}": draw(out, RANK, seed=seed)}
            if alpha is not None:
                file[f"{key}.alpha"] = torch.tensor(alpha)
    return file


@pytest.mark.parametrize("tool", FORMS)
def test_names_of_tools(tool: str, tmp_path: Path) -> None:
    """Every layer; where diffusers reads the tool's names, what it makes of them."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_z_image_lora_to_diffusers as convert

    file, network = file_of(tool), made()
    save_file(file, tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors", network, [])
    assert len(found) == 3 * len(PLAIN) - 1
    for seed, name in enumerate(PLAIN):
        out, into = PLAIN[name]
        wanted = (FORMS[tool][2] or RANK) / RANK * (draw(out, RANK, seed=seed) @ draw(RANK, into, seed=seed)).double()
        assert torch.allclose(found[f"transformer.layers.1.{name}"].change(), wanted, atol=1e-5), name
    if tool in ("ai-toolkit", "musubi-tuner", "plain"):
        theirs = convert(dict(file))
        for name, low in found.items():
            a, b = theirs[f"{name}.lora_A.weight"], theirs[f"{name}.lora_B.weight"]
            assert torch.allclose(low.change(), (b @ a).double(), atol=1e-5), name


def authors(network: ZImageTransformer) -> dict[str, Tensor]:
    """The weights under ComfyUI's names, by hand."""
    state, out = network.state_dict(), {}
    for key, value in state.items():
        if ".to_q." in key:
            parts = [state[key.replace("to_q", n)] for n in ("to_q", "to_k", "to_v")]
            out[key.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".to_k." not in key and ".to_v." not in key:
            new = key.replace("all_final_layer.2-1.", "final_layer.").replace("all_x_embedder.2-1.", "x_embedder.")
            new = new.replace("to_out.0.", "out.").replace("norm_k", "k_norm").replace("norm_q", "q_norm")
            out[new] = value
    return out


@pytest.mark.parametrize("tool", ["ComfyUI", "kohya"])
def test_the_authors_layers(tool: str, tmp_path: Path) -> None:
    """Every layer of the authors' with a matrix, fused ones and the ends too, merged: as diffusers converts the sum."""
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers as convert

    network = made()
    base, file = authors(network), {}
    for seed, (key, value) in enumerate(list(base.items())):
        if value.ndim != 2 or "pad_token" in key:
            continue
        name = key.removesuffix(".weight")
        up, down = 0.3 * draw(len(value), RANK, seed=seed), draw(RANK, value.shape[1], seed=seed)
        base[key] = value + up @ down
        if tool == "ComfyUI":
            file |= {f"diffusion_model.{name}.lora_B.weight": up, f"diffusion_model.{name}.lora_A.weight": down}
        else:
            kohya = "lora_unet_" + name.replace(".", "_")
            file |= {f"{kohya}.lora_up.weight": up, f"{kohya}.lora_down.weight": down}
            file[f"{kohya}.alpha"] = torch.tensor(float(RANK))
    save_file(file, tmp_path / "x.safetensors")
    Loras(network, []).add("x", read_lora(tmp_path / "x.safetensors", network, []))
    wanted, state = convert(dict(base)), network.state_dict()
    assert set(wanted) == set(state)
    for key, value in wanted.items():
        assert torch.allclose(state[key], value, atol=1e-5), key


def test_what_we_write_diffusers_reads(tmp_path: Path) -> None:
    """Both forms, of the layers of a LoRA as Z-Image is usually fine-tuned."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_z_image_lora_to_diffusers as convert

    network = made()
    sites = [s for s in network_sites(network) if s.name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))]
    lora = {s.name: LowRank(draw(RANK, D, seed=i), draw(D, RANK, seed=i), 1.0) for i, s in enumerate(sites)}
    for form in ("diffusers", "kohya"):
        write_lora(tmp_path / "x.safetensors", lora, network.config, form=form)  # type: ignore[arg-type]
        theirs = load_file(tmp_path / "x.safetensors")
        theirs = convert(theirs) if form == "kohya" else theirs
        for name, low in lora.items():
            a, b = theirs[f"{name}.lora_A.weight"].double(), theirs[f"{name}.lora_B.weight"].double()
            assert torch.allclose(b @ a, low.change(), atol=1e-5), (form, name)
