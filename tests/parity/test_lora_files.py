"""Adapter files: ours give our pictures in diffusers with PEFT, theirs load here, kohya's keys are kohya's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ldm.adapters.lora import LoraAdapter, LoraConfig
from ldm.adapters.low_rank import Lora
from ldm.checkpoint.convert import Components
from ldm.checkpoint.embedding_files import read_embeddings, write_embeddings
from ldm.checkpoint.lora_files import kohya_names, read_lora, write_lora
from ldm.diffusion.process import Process
from ldm.models.unet import UNet, UNetConfig
from ldm.pipeline import TextToImage
from tests.parity.test_diffusers_folder import SCHEDULER, make, picture, save
from tests.unit.adapters.test_lora import filled

torch.set_num_threads(1)
TARGETS = ("attention", "feed_forward", "projection", "convolution")


@dataclass
class Pair:
    """The same model here and in diffusers."""

    parts: Components
    theirs: Any
    noise: Tensor

    def our_picture(self) -> Tensor:
        import diffusers

        scheduler = diffusers.DDIMScheduler.from_config(SCHEDULER)
        return picture(self.parts, self.noise, scheduler).clamp(-1, 1)

    def their_picture(self, prompt: str = "a red apple", **more: Any) -> Tensor:
        settings: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "pt"}
        pictures = self.theirs(prompt, latents=self.noise, height=16, width=16, **settings, **more).images
        return pictures * 2 - 1

    def pipeline(self) -> TextToImage:
        return TextToImage(self.parts.network, self.parts.codec, self.parts.text, Process())


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    import diffusers

    parts = make(request.param)
    save(parts, tmp_path / "model")
    xl = request.param == "sdxl"
    cls = diffusers.StableDiffusionXLPipeline if xl else diffusers.StableDiffusionPipeline
    pipe = cls.from_pretrained(tmp_path / "model", **({"add_watermarker": False} if xl else {}))
    pipe.set_progress_bar_config(disable=True)
    return Pair(parts, pipe, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)))


def trained(parts: Components, config: LoraConfig) -> Lora:
    """A LoRA that changes the picture; the model is left as it was."""
    adapter = LoraAdapter(config)
    net = filled(adapter.attach(parts.network, parts.text))
    net.detach()
    parts.network.eval()
    return adapter.lora({n: 2.5 * p.detach() if "magn" not in n else p.detach() for n, p in net.named_parameters()})


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
@pytest.mark.parametrize("pair", ["sd1", "sd2", "sdxl"], indirect=True)
def test_diffusers_draws_our_picture(pair: Pair, form: Any, tmp_path: Path) -> None:
    """A LoRA on U-Net and towers, of rank 3 with alpha 5, written here and loaded there."""
    plain = pair.our_picture()
    config = LoraConfig(rank=3, alpha=5.0, text=True, targets=TARGETS)
    if form == "kohya" and pair.parts.network.config.addition_embed_type:
        config = LoraConfig(rank=3, alpha=5.0, text=True)  # diffusers' reader takes no kohya convolutions of SDXL
    lora = trained(pair.parts, config)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_lora(path, lora, pair.parts.network.config, form=form)
    pair.theirs.load_lora_weights(tmp_path, weight_name=path.name)
    pipeline = pair.pipeline()
    pipeline.load_lora(path)
    ours, theirs = pair.our_picture(), pair.their_picture()
    assert (ours - plain).abs().max() > 0.02
    assert (ours - theirs).abs().max() < 1e-3
    pipeline.set_loras({"pytorch_lora_weights": 0.5})
    scaled = pair.our_picture()
    pair.theirs.set_adapters(pair.theirs.get_active_adapters(), 0.5)
    assert (scaled - pair.their_picture()).abs().max() < 1e-3
    assert (scaled - ours).abs().max() > 0.005
    pipeline.unload_loras()
    assert torch.equal(pair.our_picture(), plain)


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
@pytest.mark.parametrize("options", [{"dora": True}, {"rslora": True, "alpha": 2.0}], ids=["dora", "rslora"])
def test_options_survive(pair: Pair, options: dict[str, Any], tmp_path: Path) -> None:
    lora = trained(pair.parts, LoraConfig(rank=4, **options))
    write_lora(tmp_path / "x.safetensors", lora, pair.parts.network.config)
    pair.theirs.load_lora_weights(tmp_path, weight_name="x.safetensors")
    pair.pipeline().load_lora(tmp_path / "x.safetensors")
    assert (pair.our_picture() - pair.their_picture()).abs().max() < 1e-3


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
@pytest.mark.parametrize("header", [True, False], ids=["with PEFT's settings", "bare"])
def test_a_file_of_diffusers_script_loads_here(pair: Pair, header: bool, tmp_path: Path) -> None:
    """As the LoRA scripts write it: PEFT's layers in the pipeline's own modules, saved by `save_lora_weights`."""
    import diffusers
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig as PeftConfig
    from peft.utils import get_peft_model_state_dict

    pipe = pair.theirs
    alpha = 6 if header else 3
    pipe.unet.add_adapter(PeftConfig(r=3, lora_alpha=alpha, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    pipe.text_encoder.add_adapter(PeftConfig(r=3, lora_alpha=alpha, target_modules=["q_proj", "out_proj"]))
    g = torch.Generator().manual_seed(4)
    for module in (pipe.unet, pipe.text_encoder):
        for name, p in module.named_parameters():
            if "lora_" in name:
                p.data = 0.2 * torch.randn(p.shape, generator=g)
    modules = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    layers = {k: convert_state_dict_to_diffusers(get_peft_model_state_dict(m)) for k, m in modules.items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        **(_collate_lora_metadata(modules) if header else {}),
    )
    pair.pipeline().load_lora(tmp_path)
    assert (pair.our_picture() - pair.their_picture()).abs().max() < 1e-3


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
@pytest.mark.parametrize("form", ["processors", "linear layers", "header"])
def test_older_names_and_patterns_as_diffusers_reads_them(pair: Pair, form: str, tmp_path: Path) -> None:
    """Names of 0.16 to 0.18 in U-Net and tower (huggingface/diffusers#2918); ranks, alphas and rslora of the header."""
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(4)
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    tower = "text_encoder.text_model.encoder.layers.1.self_attn"
    kinds = {"processors": ("_lora.down", "_lora.up"), "linear layers": (".lora.down", ".lora.up")}
    down, up = kinds.get(form, (".lora_A", ".lora_B"))
    own = ("q", "k", "v", "out") if form == "processors" else ("q_proj", "k_proj", "v_proj", "out_proj")
    middle = ".processor" if form == "processors" else ""
    if form == "linear layers":
        kinds["tower"] = (".lora_linear_layer.down", ".lora_linear_layer.up")
    file = {}
    for i, kind in enumerate(("to_q", "to_k", "to_v", "to_out")):
        rank = 2 if form == "header" and kind == "to_k" else 4
        name = f"{block}.attn1{middle}.{kind}" + (".0" if kind == "to_out" and form != "processors" else "")
        file[f"{name}{down}.weight"] = 0.4 * torch.randn(rank, 16, generator=g)
        file[f"{name}{up}.weight"] = 0.4 * torch.randn(16, rank, generator=g)
        name = f"{tower}.to_{own[i]}" if form == "processors" else f"{tower}.{own[i]}"
        a, b = kinds.get("tower", (down, up))
        file[f"{name}{a}.weight"] = 0.4 * torch.randn(4, 32, generator=g)
        file[f"{name}{b}.weight"] = 0.4 * torch.randn(32, 4, generator=g)
    shared = {"r": 4, "lora_alpha": 3, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "peft_type": "LORA"}
    unet = shared | {"rank_pattern": {"attn1.to_k": 2}, "alpha_pattern": {"to_q": 7, "attn1.to_k": 5}}
    text = shared | {"target_modules": [*own], "use_rslora": True}
    told = {f"unet.{k}": v for k, v in unet.items()} | {f"text_encoder.{k}": v for k, v in text.items()}
    notes = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(told)} if form == "header" else {})
    save_file(file, tmp_path / "pytorch_lora_weights.safetensors", metadata=notes)
    plain = pair.our_picture()
    pair.theirs.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    pair.pipeline().load_lora(tmp_path)
    ours = pair.our_picture()
    assert (ours - plain).abs().max() > 1e-3
    assert (ours - pair.their_picture()).abs().max() < 1e-5


def test_kohya_layout(tmp_path: Path) -> None:
    """Names, alpha and header of sd-scripts' networks.lora for SD 1.x, as its published files have them."""
    parts = make("sd1")
    lora = trained(parts, LoraConfig(rank=3, alpha=1.5, text=True, targets=("attention", "convolution")))
    path = tmp_path / "x.safetensors"
    write_lora(path, lora, parts.network.config, form="kohya", metadata={"ss_output_name": "x"})
    tensors = load_file(path)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert tensors[f"{stem}.lora_down.weight"].shape == (3, 16)
    assert tensors[f"{stem}.lora_up.weight"].shape == (16, 3)
    assert tensors[f"{stem}.alpha"].shape == ()
    assert float(tensors[f"{stem}.alpha"]) == 1.5
    assert tensors["lora_unet_mid_block_resnets_0_conv1.lora_down.weight"].shape == (3, 32, 3, 3)
    assert tensors["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"].shape == (32, 3, 1, 1)
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in tensors
    assert {k.rpartition(".lora_")[0] or k.removesuffix(".alpha") for k in tensors} == set(
        kohya_names(lora, parts.network.config).values()
    )
    with safe_open(path, "pt") as handle:
        notes = handle.metadata()
    assert notes["ss_network_module"] == "networks.lora"
    assert (notes["ss_network_dim"], notes["ss_network_alpha"], notes["ss_output_name"]) == ("3", "1.5", "x")
    assert json.loads(notes["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "1.5"}
    back = read_lora(path, parts.network, parts.text)
    assert set(back) == set(lora)
    assert all(torch.equal(back[n].up, lora[n].up) and back[n].alpha == 1.5 for n in lora)


def test_kohya_names_of_sdxl() -> None:
    """The published SDXL LoRAs' names: CompVis blocks for the U-Net, two towers."""
    from ldm.adapters.sites import network_sites
    from ldm.models.presets import UNETS

    with torch.device("meta"):
        unet = UNet(UNETS["sdxl"])
    names = kohya_names([s.name for s in network_sites(unet)], unet.config)
    for ours, theirs in {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
        ),
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj": (
            "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj"
        ),
        "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
        "up_blocks.0.attentions.2.transformer_blocks.3.attn2.to_out.0": (
            "output_blocks_2_1_transformer_blocks_3_attn2_to_out_0"
        ),
        "up_blocks.1.attentions.0.proj_out": "output_blocks_3_1_proj_out",
        "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    }.items():
        assert names[f"unet.{ours}"] == f"lora_unet_{theirs}"
    two = ["text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"]
    assert list(kohya_names(two, UNETS["sdxl"]).values()) == [
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1",
    ]


@pytest.mark.parametrize("form", ["diffusers", "a1111", "a1111_pt"])
@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
def test_embeddings_give_the_same_pictures(pair: Pair, form: Any, tmp_path: Path) -> None:
    """Three vectors: the prompt names the token once and both sides expand it."""
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    path = tmp_path / ("<thing>.pt" if form == "a1111_pt" else "<thing>.safetensors")
    write_embeddings(path, {"<thing>": [rows]}, form=form)
    pair.theirs.load_textual_inversion(path, **({"token": "<thing>"} if form == "a1111" else {}))
    pipeline = pair.pipeline()
    assert pipeline.load_embedding(path) == ["<thing>"]
    prompt = "a red <thing>, apple"
    theirs = pair.theirs.encode_prompt(prompt, "cpu", 1, False)[0]
    ours = pipeline.encode_text([prompt])["text"]
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - pipeline.encode_text(["a red, apple"])["text"]).abs().max() > 0.1


def test_embedding_forms_read_back(tmp_path: Path) -> None:
    small, large = torch.randn(2, 8), torch.randn(2, 12)
    write_embeddings(tmp_path / "xl.safetensors", {"<x>": [small, large]})
    assert set(load_file(tmp_path / "xl.safetensors")) == {"clip_l", "clip_g"}
    found = read_embeddings(tmp_path / "xl.safetensors")
    assert list(found) == ["<x>"]
    assert torch.equal(found["<x>"][1], large)
    write_embeddings(tmp_path / "learned_embeds.safetensors", {"<a>": [small], "<b>": [small[:1]]})
    assert {k: v[0].shape[0] for k, v in read_embeddings(tmp_path).items()} == {"<a>": 2, "<b>": 1}
    torch.save({"<old>": small[0]}, tmp_path / "learned_embeds.bin")
    assert read_embeddings(tmp_path / "learned_embeds.bin", "<new>")["<new>"][0].shape == (1, 8)
    with pytest.raises(ValueError, match="one token a file"):
        write_embeddings(tmp_path / "no.safetensors", {"<a>": [small], "<b>": [small]}, form="a1111")
    with pytest.raises(ValueError, match="no such file"):
        read_embeddings(tmp_path / "missing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_embeddings(tmp_path / "bad.safetensors")


def test_files_for_another_model_are_refused(tmp_path: Path) -> None:
    parts, other = make("sd1"), make("sdxl")
    write_lora(tmp_path / "x.safetensors", trained(other, LoraConfig(text=True)), other.network.config)
    with pytest.raises(ValueError, match=r"64 of 104 tensors fit this model; not used: 40 key.*text_encoder_2"):
        read_lora(tmp_path / "x.safetensors", parts.network, parts.text)
    wide = UNet(UNetConfig(**{**vars(parts.network.config), "cross_attention_dim": 48}))
    write_lora(tmp_path / "y.safetensors", trained(parts, LoraConfig()), parts.network.config)
    pipeline = TextToImage(wide, parts.codec, parts.text, Process())
    with pytest.raises(ValueError, match="another base model"):
        pipeline.load_lora(tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match=r"no such \.safetensors file"):
        pipeline.load_lora(tmp_path / "z.safetensors")
