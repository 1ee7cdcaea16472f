"""IP-Adapters against diffusers': the network's answers at narrow and at published shapes, and image encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint.ip_adapter_files import load_ip_adapter
from ldm.checkpoint.vision import load_image_encoder
from ldm.models import presets
from ldm.models.unet import IPAdapter, IPAdapterConfig, UNet, UNetConfig
from ldm.models.unet.image_prompt import Kind, places, weighted
from tests.parity.test_diffusers_folder import make

torch.set_num_threads(1)
VISION = {"hidden_size": 48, "intermediate_size": 96, "projection_dim": 24, "num_hidden_layers": 3,
          "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "hidden_act": "gelu"}  # fmt: skip
PUBLISHED: dict[str, tuple[str, Kind, int, int, int]] = {
    "ip-adapter_sd15": ("sd15", "plain", 1024, 4, 32),
    "ip-adapter-plus_sd15": ("sd15", "plus", 1280, 16, 32),
    "ip-adapter_sdxl": ("sdxl", "plain", 1280, 4, 140),
    "ip-adapter_sdxl_vit-h": ("sdxl", "plain", 1024, 4, 140),
    "ip-adapter-plus_sdxl_vit-h": ("sdxl", "plus", 1280, 16, 140),
}
"""Family, kind, features of the image encoder, tokens, tensors of layers."""


def adapter(unet: UNetConfig, kind: Kind, features: int, seed: int = 0, **changes: Any) -> IPAdapter:
    torch.manual_seed(seed)
    made = IPAdapter(IPAdapterConfig.of(unet, features, kind, **changes))
    for name, parameter in made.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    return made.requires_grad_(False)


def write(made: IPAdapter, folder: Path, name: str = "adapter.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in made.state_dict().items()}, folder / name)
    return folder / name


def vision(folder: Path, **changes: Any) -> Any:
    """transformers' image encoder, written into a folder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(5)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION | changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def theirs_of(unet: UNet) -> Any:
    from diffusers import UNet2DConditionModel

    from ldm.config.load import encode

    plain = {k: v for k, v in encode(unet.config).items() if k != "kind"}
    heads = unet.config.heads
    plain |= {"attention_head_dim": heads if len(set(heads)) > 1 else heads[0], "num_attention_heads": None}
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(plain)
    model.load_state_dict(unet.state_dict(), assign=True)
    return model.eval()


@torch.no_grad()
def compared(
    unet: UNet, made: IPAdapter, states: Tensor, file: Path, scale: float, side: int = 8
) -> tuple[float, float]:
    """(relative distance of both answers, relative size of what the picture changes)."""
    loaded = load_ip_adapter(file)
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(1, 4, 8, 8, generator=g), torch.tensor([321])
    text = torch.randn(1, 7, made.config.width, generator=g)
    cond = {"text": text}
    extra = {}
    if unet.config.addition_embed_type:
        wide = unet.config.projection_class_embeddings_input_dim or 0
        pooled = torch.randn(1, wide - 6 * (unet.config.addition_time_embed_dim or 0), generator=g)
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
        cond |= {"pooled": pooled, "time_ids": ids}
        extra = {"text_embeds": pooled, "time_ids": ids}
    order = places(unet.config)
    kv = weighted(loaded(states, [n for n, _ in order]), scale, [c for _, c in order])
    plain, found = unet(x, t, cond), unet(x, t, cond | {"image_kv.0": kv})
    peer = theirs_of(unet)
    flat = {part: {k.removeprefix(f"{part}."): v for k, v in loaded.state_dict().items() if k.startswith(f"{part}.")}
            for part in ("image_proj", "ip_adapter")}  # fmt: skip
    peer._load_ip_adapter_weights([flat], low_cpu_mem_usage=False)
    for processor in peer.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]
    wanted = peer(x, t, text, added_cond_kwargs=extra | {"image_embeds": [states[:, None]]}).sample
    size = wanted.abs().max()
    return float((found - wanted).abs().max() / size), float((found - plain).abs().max() / size)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_the_network_answers_as_theirs(family: str, kind: Kind, tmp_path: Path) -> None:
    unet = make(family).network
    assert isinstance(unet, UNet)
    features = 24 if kind == "plain" else 48
    # diffusers has 4 tokens of a plain one, and four layers of a resampler, whatever the file
    made = adapter(unet.config, kind, features)
    states = torch.randn(1, *([17] if kind != "plain" else []), features, generator=torch.Generator().manual_seed(3))
    distance, seen = compared(unet, made, states, write(made, tmp_path), 0.7)
    assert seen > 1e-3
    assert distance < 1e-5


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name: str) -> None:
    """Names and shapes of the published files, as diffusers' modules of these settings have them."""
    family, kind, features, tokens, layers = PUBLISHED[name]
    unet = presets.UNETS[family]
    assert isinstance(unet, UNetConfig)
    with torch.device("meta"):
        made = IPAdapter(IPAdapterConfig.of(unet, features, kind))
    shapes = {k: tuple(v.shape) for k, v in made.state_dict().items()}
    width = 768 if family == "sd15" else 2048
    own = {k for k in shapes if k.startswith("ip_adapter.")}
    assert len(own) == layers
    assert own == {f"ip_adapter.{n}.to_{w}_ip.weight" for n in range(1, layers, 2) for w in "kv"}
    assert all(shapes[k][1] == width for k in own)
    if name == "ip-adapter_sd15":  # "only 22M parameters"
        assert round(sum(v.numel() for v in made.parameters()) / 1e6) == 22
    if kind == "plain":
        assert shapes["image_proj.proj.weight"] == (4 * width, features)
        assert shapes["image_proj.norm.weight"] == (width,)
    else:
        hidden = 768 if family == "sd15" else 1280
        assert shapes["image_proj.latents"] == (1, tokens, hidden)
        assert shapes["image_proj.proj_in.weight"] == (hidden, features)
        assert shapes["image_proj.proj_out.weight"] == (width, hidden)
        assert shapes["image_proj.layers.3.0.to_kv.weight"] == (2 * hidden, hidden)
        assert shapes["image_proj.layers.3.1.1.weight"] == (4 * hidden, hidden)
    first, last = ("ip_adapter.1", f"ip_adapter.{layers - 1}")
    assert shapes[f"{first}.to_k_ip.weight"][0] == (320 if family == "sd15" else 640)
    assert shapes[f"{last}.to_k_ip.weight"][0] == 1280  # the middle is stored last


@pytest.mark.parametrize("size", [(50, 77), (40, 20), (32, 32), (200, 33)])
def test_pictures_come_as_from_their_processor(size: tuple[int, int], tmp_path: Path) -> None:
    """Bit for bit as by their processor of PIL; that of torchvision rounds one level otherwise here and there."""
    from transformers import CLIPImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vision(tmp_path)
    found = load_image_encoder(tmp_path).pixels([picture(1, size)])
    same = CLIPImageProcessorPil(size=32, crop_size=32)(picture(1, size), return_tensors="pt").pixel_values
    near = CLIPImageProcessor(size=32, crop_size=32)(picture(1, size), return_tensors="pt").pixel_values
    assert torch.equal(found, same)
    assert (found - near).abs().max() < 1.01 / 255 / 0.26


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_the_image_encoder_sees_what_theirs_sees(act: str, tmp_path: Path) -> None:
    theirs = vision(tmp_path, hidden_act=act)
    encoder, pixels = load_image_encoder(tmp_path), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = theirs(pixels, output_hidden_states=True)
    assert (encoder(pixels) - wanted.image_embeds).abs().max() < 1e-5 * wanted.image_embeds.abs().max()
    states = wanted.hidden_states[-2]
    assert (encoder(pixels, states=True) - states).abs().max() < 1e-5 * states.abs().max()
    assert not encoder.blank().any()
    with torch.no_grad():
        blank = theirs(torch.zeros(1, 3, 32, 32), output_hidden_states=True).hidden_states[-2]
    assert (encoder.blank(states=True) - blank).abs().max() < 1e-5 * blank.abs().max()


def test_a_whole_clip_has_one_too(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(vision_config=VISION, text_config={"hidden_size": 16, "num_hidden_layers": 1,
                      "num_attention_heads": 2, "intermediate_size": 16}, projection_dim=20)).eval()  # fmt: skip
    whole.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        seen = whole.visual_projection(whole.vision_model(pixels).pooler_output)
    assert (load_image_encoder(tmp_path)(pixels) - seen).abs().max() < 1e-5 * seen.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ip-adapter_sd15", "ip-adapter-plus_sd15", "ip-adapter-plus_sdxl_vit-h"])
def test_the_published_network_answers_as_theirs(name: str, tmp_path: Path) -> None:
    family, kind, features, *_ = PUBLISHED[name]
    config = presets.UNETS[family]
    assert isinstance(config, UNetConfig)
    with torch.device("meta"):
        unet = UNet(config)
    unet.to_empty(device="cpu")
    g = torch.Generator().manual_seed(0)
    for key, p in unet.named_parameters():
        with torch.no_grad():
            if p.ndim > 1:
                p.uniform_(-1, 1, generator=g).mul_((3 / p[0].numel()) ** 0.5)
            else:
                p.fill_(1.0 if key.endswith("weight") else 0.0)
    unet.eval().requires_grad_(False)
    made = adapter(config, kind, features)
    states = torch.randn(1, *([257] if kind == "plus" else []), features, generator=g)
    distance, seen = compared(unet, made, states, write(made, tmp_path), 0.6)
    print(name, distance, seen)
    assert seen > 1e-3
    assert distance < 1e-5
