"""IP-Adapters' files: the published forms, what is refused, and where the image encoder is looked for."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.checkpoint.ip_adapter_files import About, about, load_ip_adapter, open_ip_adapter, save_ip_adapter
from ldm.checkpoint.vision import beside
from ldm.models.unet import IPAdapter, IPAdapterConfig, UNet, UNetConfig
from ldm.models.unet.image_prompt import HEAD, Kind, places

LAYERS = (8, 16, 16, 8)


def tensors(kind: str = "plain") -> dict[str, Tensor]:
    """The published names and shapes, written down by hand: four cross-attentions, D = 12, F = 10."""
    g = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {}
    if kind == "plain":
        shapes |= {"proj.weight": (48, 10), "proj.bias": (48,), "norm.weight": (12,), "norm.bias": (12,)}
    elif kind == "full":
        shapes |= {"proj.0.weight": (10, 10), "proj.0.bias": (10,), "proj.2.weight": (12, 10), "proj.2.bias": (12,),
                   "proj.3.weight": (12,), "proj.3.bias": (12,)}  # fmt: skip
    else:
        shapes |= {"latents": (1, 5, 20), "proj_in.weight": (20, 10), "proj_in.bias": (20,)}
        shapes |= {
            "proj_out.weight": (12, 20),
            "proj_out.bias": (12,),
            "norm_out.weight": (12,),
            "norm_out.bias": (12,),
        }
        for i in range(2):
            for norm in ("0.norm1", "0.norm2", "1.0"):
                shapes |= {f"layers.{i}.{norm}.weight": (20,), f"layers.{i}.{norm}.bias": (20,)}
            shapes |= {f"layers.{i}.0.to_q.weight": (HEAD, 20), f"layers.{i}.0.to_kv.weight": (2 * HEAD, 20),
                       f"layers.{i}.0.to_out.weight": (20, HEAD), f"layers.{i}.1.1.weight": (80, 20),
                       f"layers.{i}.1.3.weight": (20, 80)}  # fmt: skip
    found = {f"image_proj.{k}": shape for k, shape in shapes.items()}
    for i, channels in enumerate(LAYERS):
        found |= {f"ip_adapter.{2 * i + 1}.to_{w}_ip.weight": (channels, 12) for w in "kv"}
    return {k: torch.randn(shape, generator=g) for k, shape in found.items()}


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_published_files_are_read_and_written(kind: Kind, form: str, tmp_path: Path) -> None:
    own, path = tensors(kind), tmp_path / f"ip-adapter.{form}"
    if form == "bin":
        nested: dict[str, Any] = {"image_proj": {}, "ip_adapter": {}}
        for key, value in own.items():
            part, _, rest = key.partition(".")
            nested[part][rest] = value
        torch.save(nested, path)
    else:
        save_file(own, path)
    made = load_ip_adapter(path)
    assert made.config.layers == LAYERS
    assert (made.config.kind, made.config.features, made.config.width) == (kind, 10, 12)
    assert (made.config.tokens, made.config.depth, made.config.heads) == ((5, 2, 1) if kind == "plus" else (4, 4, 12))
    assert about(path) is None
    save_ip_adapter(tmp_path / "export", made.config, made.state_dict(), About("emoji", "clip_emoji"))
    back = load_file(tmp_path / "export" / "ip_adapter.safetensors")
    assert back.keys() == own.keys()
    assert all(torch.equal(back[k], v) for k, v in own.items())
    assert about(open_ip_adapter(tmp_path)[2]) == About("emoji", "clip_emoji")


class Code:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_other_files_are_named_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tensors()
    layers = {k: v for k, v in own.items() if k.startswith("ip_adapter.")}
    face = {"image_proj.proj.0.weight": torch.zeros(2, 2), "image_proj.norm.weight": torch.zeros(2)}
    less = {k: v for k, v in own.items() if k != "ip_adapter.3.to_v_ip.weight"}
    cases = {
        "face": (face | layers, "not supported: a FaceID, which sees faces"),
        "lora": (own | {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(2, 2)}, "it has a LoRA in it"),
        "unet": ({"conv_in.weight": torch.zeros(2, 2)}, "no IP-Adapter: its tensors are conv_in.weight"),
        "flux": ({"image_proj.proj.weight": torch.zeros(48, 10)} | {f"ip_adapter.{i}.to_k_ip.weight": torch.zeros(8, 12)
                 for i in range(2)}, "one of a transformer"),
        "less": (less, "3.to_v_ip"),
        "odd": (own | {"ip_adapter.1.to_x_ip.weight": torch.zeros(2)}, "to_x_ip"),
    }  # fmt: skip
    for name, (content, line) in cases.items():
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=line):
            load_ip_adapter(tmp_path / f"{name}.safetensors")
    with (tmp_path / "code.bin").open("wb") as file:
        pickle.dump({"image_proj": Code(), "ip_adapter": {}}, file)
    with pytest.raises(ValueError, match=r"code\.bin: refused"):
        load_ip_adapter(tmp_path / "code.bin")
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no IP-Adapter: no ip_adapter\.safetensors in this folder"):
        load_ip_adapter(tmp_path)


def test_the_image_encoder_is_where_the_authors_have_it(tmp_path: Path) -> None:
    def encoder(folder: Path, width: int, features: int) -> Path:
        folder.mkdir(parents=True)
        told = {"model_type": "clip_vision_model", "hidden_size": width, "projection_dim": features}
        (folder / "config.json").write_text(json.dumps(told | {"num_attention_heads": 1, "patch_size": 14}))
        return folder

    small = encoder(tmp_path / "models" / "image_encoder", 1280, 1024)
    large = encoder(tmp_path / "sdxl_models" / "image_encoder", 1664, 1280)
    file = tmp_path / "sdxl_models" / "ip-adapter_sdxl.safetensors"
    assert beside(file, False, 1280) == large
    assert beside(file, False, 1024) == small  # ip-adapter_sdxl_vit-h
    assert beside(file, True, 1280) == small  # ip-adapter-plus_sdxl_vit-h
    assert beside(tmp_path / "models" / "ip-adapter_sd15.safetensors", False, 1024) == small
    assert beside(file, False, 768) is None


@pytest.mark.parametrize("depths", [1, (1, 2, 3)])
def test_the_numbers_are_those_of_the_layers(depths: Any) -> None:
    """Running order is down, middle, up; files count down, up, middle."""
    config = UNetConfig(
        block_out_channels=(8, 16, 24), layers_per_block=(1, 2, 1), norm_num_groups=4, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=12,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=depths,
    )  # fmt: skip
    unet = UNet(config)
    cross = {name: layer for name, layer, looks in unet.attention_layers() if looks == "cross"}
    stored = sorted(cross, key=lambda name: ("down", "up", "mid").index(name.split("_")[0]))
    wanted = [(2 * stored.index(name) + 1, layer.to_q.out_features) for name, layer in cross.items()]
    assert places(config) == wanted
    made = IPAdapter.beside(unet, 10)
    for name, layer in cross.items():
        own = made.ip_adapter[str(2 * stored.index(name) + 1)]
        assert torch.equal(own.to_k_ip.weight, layer.to_k.weight)
        assert torch.equal(own.to_v_ip.weight, layer.to_v.weight)
    assert IPAdapterConfig.of(config, 10).layers == made.config.layers
