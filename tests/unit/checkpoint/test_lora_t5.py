"""LoRA on T5: files of several tools, by hand merged in float64; our own files come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.adapters.low_rank import Loras
from ldm.adapters.sites import t5_sites
from ldm.checkpoint.lora_files import kohya_holds, read_lora, write_lora
from ldm.models.network import Network
from ldm.models.text import TextEncoder
from tests.families import make

LAYERS = ("block.0.layer.0.SelfAttention.q", "block.1.layer.0.SelfAttention.o", "block.1.layer.1.DenseReluDense.wi_1")
KIND = {"sd3": ("text_encoder_3", 2), "flux": ("text_encoder_2", 1), "pixart": ("text_encoder", 0)}
FORMS = {  # a tool's name of "encoder." + layer, and of both matrices; whether dots become underscores
    "kohya": ("lora_te3_encoder_", "lora_down.weight", "lora_up.weight", True),
    "OneTrainer": ("lora_te2_encoder_", "lora_down.weight", "lora_up.weight", True),
    "ComfyUI": ("text_encoders.t5xxl.transformer.encoder.", "lora_A.weight", "lora_B.weight", False),
    "PEFT": ("base_model.model.{}.encoder.", "lora_A.weight", "lora_B.weight", False),
}


@pytest.fixture(params=list(KIND))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Network, list[TextEncoder]]:
    parts = make(request.param, tmp_path / "t5")
    return request.param, parts.network, list(parts.text)


def weights(encoder: TextEncoder) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in encoder.model.state_dict().items()}


@pytest.mark.parametrize("form", FORMS)
def test_files_of_other_tools_are_merged(
    form: str, model: tuple[str, Network, list[TextEncoder]], tmp_path: Path
) -> None:
    kind, network, text = model
    component, place = KIND[kind]
    start, down, up, flat = FORMS[form]
    file, want = {}, {k: v.double() for k, v in weights(text[place]).items()}
    torch.manual_seed(0)
    for layer in LAYERS:
        name = f"encoder.{layer}.weight"
        out, into = want[name].shape
        a, b, alpha = torch.randn(3, into), torch.randn(out, 3), 3.0 if "lora_A" in down else 1.5
        key = start.format(component) + (layer.replace(".", "_") if flat else layer)
        file |= {f"{key}.{down}": a, f"{key}.{up}": b}
        if flat:
            file[f"{key}.alpha"] = torch.tensor(alpha)
        want[name] += 0.5 * alpha / 3 * b.double() @ a.double()
    save_file(file, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", network, text)
    assert set(lora) == {f"{component}.encoder.{layer}" for layer in LAYERS}
    before, loras = weights(text[place]), Loras(network, text)
    tokens = text[place](["a red apple"])["text"]
    loras.add("x", lora, 0.5)
    for name, value in text[place].model.state_dict().items():
        assert torch.allclose(value.double(), want[name], rtol=1e-6, atol=1e-7), name
    assert (text[place](["a red apple"])["text"] - tokens).abs().max() > 1e-3
    loras.remove("x")
    assert all(torch.equal(v, before[k]) for k, v in text[place].model.state_dict().items())


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_ours_come_back(form: str, model: tuple[str, Network, list[TextEncoder]], tmp_path: Path) -> None:
    """PixArt, of which kohya's scripts know nothing, in diffusers' form alone."""
    from ldm.adapters.low_rank import LowRank

    kind, network, text = model
    torch.manual_seed(1)
    lora = {
        site.name: LowRank(torch.randn(2, site.read().shape[1]), torch.randn(len(site.read()), 2), 4.0)
        for site in t5_sites(text)
    }
    assert len(lora) == 14, "two blocks of seven"
    path = tmp_path / "x.safetensors"
    if (kind, form) == ("pixart", "kohya"):
        assert not kohya_holds(lora, path, network.config)
        return
    write_lora(path, lora, network.config, form=form)  # type: ignore[arg-type]
    if form == "kohya":
        assert all(key.startswith("lora_te3_encoder_block_") for key in load_file(path))
    back = read_lora(path, network, text)
    assert set(back) == set(lora)
    for name, low in lora.items():
        assert torch.allclose(back[name].change(), low.change(), rtol=1e-5, atol=1e-6)


def test_another_width_and_no_t5_are_one_line(tmp_path: Path) -> None:
    parts = make("sd3_no_t5", tmp_path / "t5")
    key = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    save_file(
        {f"{key}.lora_down.weight": torch.ones(1, 8), f"{key}.lora_up.weight": torch.ones(8, 1)}, tmp_path / "x.st"
    )
    (tmp_path / "x.st").rename(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="this model has no T5 that it fits"):
        read_lora(tmp_path / "x.safetensors", parts.network, parts.text)
    other = make("sd3", tmp_path / "t5")
    with pytest.raises(ValueError, match=r"SelfAttention.q has shape \(8, 8\), the model's is \(32, 40\)"):
        read_lora(tmp_path / "x.safetensors", other.network, other.text)
