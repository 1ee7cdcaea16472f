"""With pictures as prompts our pipeline draws what diffusers' draw from the same noise, weights and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint.ip_adapter_files import load_ip_adapter
from ldm.checkpoint.vision import load_image_encoder
from ldm.models.unet import UNet
from ldm.pipeline import Control, ImagePrompt, Settings, TextToImage
from ldm.rng import Rng
from tests.parity.test_controlnet_pipelines import networks
from tests.parity.test_diffusers_folder import make, save
from tests.parity.test_ip_adapter import adapter, picture, vision, write
from tests.parity.test_pipelines import BOUND, NEGATIVE, PROMPT, STEPS

torch.set_num_threads(1)
CASES: dict[str, list[dict[str, Any]]] = {
    "one": [{}],
    "plus": [{"kind": "plus"}],
    "two pictures as one": [{"pictures": 2, "scale": 0.8}],
    "two": [{"scale": 0.7}, {"kind": "plus", "scale": 0.5}],
}


def prompts(folder: Path, parts: Any, uses: list[dict[str, Any]]) -> tuple[list[ImagePrompt], list[str], list[Any]]:
    """Ours, and the files and pictures that diffusers is given."""
    assert isinstance(parts.network, UNet)
    encoder = load_image_encoder(folder / "image_encoder")
    made, files, pictures = [], [], []
    for i, use in enumerate(uses):
        kind = use.get("kind", "plain")
        net = adapter(parts.network.config, kind, 24 if kind == "plain" else 48, seed=i)
        for name, value in net.ip_adapter.named_parameters():  # so that it is seen
            value *= 40 if "to_v_ip" in name else 2
        file = write(net, folder, f"adapter-{i}.safetensors")
        shown = [picture(7 + i + 5 * k, (40, 37)) for k in range(use.get("pictures", 1))]
        told: Any = shown if len(shown) > 1 else shown[0]
        scale = use.get("scale", 1.0)
        made.append(ImagePrompt(adapter=load_ip_adapter(file), encoder=encoder, picture=told, scale=scale))
        files.append(file.name)
        pictures.append(told)
    return made, files, pictures


def drawn(folder: Path, noise: Tensor, images: list[ImagePrompt], controls: list[Control], **changes: Any) -> Tensor:
    pipe = TextToImage.load(folder)
    for file, weight in changes.pop("loras", ()):
        pipe.load_lora(file, weight)
    pipe = pipe.controlled(controls) if controls else pipe
    pipe = pipe.image_prompted(images) if images else pipe
    settings = Settings(**{"steps": 10, "guidance": 5.0, "size": (16, 24), "negative": NEGATIVE} | changes)
    return pipe.decode(pipe.latents([PROMPT], settings, Rng(0, (0,)), x=noise), settings)


def told(pipe: Any, folder: Path, files: list[str], uses: list[dict[str, Any]]) -> Any:
    """diffusers' pipeline with the adapters."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pipe.set_progress_bar_config(disable=True)
    count = len(files)
    pipe.load_ip_adapter([str(folder)] * count, subfolder=[""] * count, weight_name=files, low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale([use.get("scale", 1.0) for use in uses])
    pipe.feature_extractor = CLIPImageProcessorPil(size=32, crop_size=32)
    return pipe


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("name", CASES)
def test_draws_as_theirs(family: str, name: str, tmp_path: Path) -> None:
    import diffusers

    uses, folder = CASES[name], tmp_path / "ours"
    parts = make(family)
    save(parts, folder)
    vision(folder / "image_encoder")
    ours, files, pictures = prompts(folder, parts, uses)
    cls = diffusers.StableDiffusionPipeline if family == "sd1" else diffusers.StableDiffusionXLPipeline
    pipe = told(cls.from_pretrained(folder), folder, files, uses)
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    wanted = pipe(PROMPT, negative_prompt=NEGATIVE, latents=noise, ip_adapter_image=pictures, **STEPS).images * 2 - 1
    plain = drawn(folder, noise, [], [])
    found = drawn(folder, noise, ours, [])
    assert (wanted - plain).abs().max() > 5 * BOUND  # the picture is seen
    assert (found - wanted).abs().max() < BOUND
    if name == "one":
        plain_guided = pipe(PROMPT, latents=noise, ip_adapter_image=pictures, **{**STEPS, "guidance_scale": 1.0}).images
        assert (drawn(folder, noise, ours, [], guidance=1.0) - (plain_guided * 2 - 1)).abs().max() < BOUND


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_under_a_controlnet_and_with_a_lora(family: str, tmp_path: Path) -> None:
    import diffusers
    from peft import LoraConfig

    uses, folder = [{"scale": 0.6}], tmp_path / "ours"
    parts = make(family)
    save(parts, folder)
    vision(folder / "image_encoder")
    ours, files, pictures = prompts(folder, parts, uses)
    (net,), (peer,) = networks(tmp_path, parts, [{}])
    cls = (
        diffusers.StableDiffusionControlNetPipeline
        if family == "sd1"
        else diffusers.StableDiffusionXLControlNetPipeline
    )
    pipe = cls.from_pretrained(folder, controlnet=peer)
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_k", "to_v", "to_out.0", "proj_out"]))
    for key, value in pipe.unet.named_parameters():
        if "lora" in key:
            torch.nn.init.normal_(value, std=0.2)
    from peft import get_peft_model_state_dict

    cls.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(pipe.unet))
    pipe = cls.from_pretrained(folder, controlnet=peer)
    pipe.load_lora_weights(tmp_path / "lora")
    pipe.fuse_lora(lora_scale=0.8)
    pipe.unload_lora_weights()
    pipe = told(pipe, folder, files, uses)
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    shown = picture(3, (16, 24))
    wanted = pipe(
        PROMPT, negative_prompt=NEGATIVE, latents=noise, ip_adapter_image=pictures, image=shown,
        controlnet_conditioning_scale=0.7, **STEPS,
    ).images * 2 - 1  # fmt: skip
    controls = [Control(network=net, picture=shown, scale=0.7)]
    loras = [(next((tmp_path / "lora").glob("*.safetensors")), 0.8)]
    found = drawn(folder, noise, ours, controls, loras=loras)
    for without in (
        drawn(folder, noise, [], controls, loras=loras),
        drawn(folder, noise, ours, [], loras=loras),
        drawn(folder, noise, ours, controls),
    ):
        assert (without - found).abs().max() > 3 * BOUND
    assert (found - wanted).abs().max() < BOUND


def test_each_prompt_has_its_picture_whatever_the_batch(tmp_path: Path) -> None:
    parts = make("sd1")
    save(parts, tmp_path / "ours")
    vision(tmp_path / "ours" / "image_encoder")
    (one,), *_ = prompts(tmp_path / "ours", parts, [{}])
    shown = [picture(i, (32, 32)) for i in range(3)]
    words, pipe = ["red", "green", "blue"], TextToImage.load(tmp_path / "ours")
    how = {"steps": 4, "guidance": 3.0, "size": (16, 24)}

    def under(picture: Any, each: bool) -> TextToImage:
        return pipe.image_prompted([ImagePrompt(adapter=one.adapter, encoder=one.encoder, picture=picture, each=each)])

    together = under(shown, True)
    at_once = together.sample(words, settings=Settings(**how))
    in_twos = together.sample(words, settings=Settings(**how, batch=2))
    second = under(shown[1], False).sample(["green"], settings=Settings(**how), indices=[1])
    assert (at_once - in_twos).abs().max() < 1e-4
    assert (at_once[1:2] - second).abs().max() < 1e-4
    assert (
        at_once[1:2] - under(shown[0], False).sample(["green"], settings=Settings(**how), indices=[1])
    ).abs().max() > 1e-3
    with pytest.raises(ValueError, match="3 pictures, but more prompts"):
        together.sample([*words, "more"], settings=Settings(**how))
    off = pipe.image_prompted([ImagePrompt(adapter=one.adapter, encoder=one.encoder, picture=shown[0], scale=0.0)])
    assert torch.equal(off.sample(words, settings=Settings(**how)), pipe.sample(words, settings=Settings(**how)))


def test_bad_uses_are_refused(tmp_path: Path) -> None:
    parts = make("sd1")
    save(parts, tmp_path)
    vision(tmp_path / "image_encoder")
    (one,), *_ = prompts(tmp_path, parts, [{}])
    image = Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match=r"ref: scale must be at least 0, got -0\.1"):
        ImagePrompt(adapter=one.adapter, encoder=one.encoder, picture=image, scale=-0.1, name="ref")
    with pytest.raises(ValueError, match="ref: expected at least one picture"):
        ImagePrompt(adapter=one.adapter, encoder=one.encoder, picture=[], name="ref")
    wrong = adapter(parts.network.config, "plain", 48)
    line = r"ref: the image encoder .* gives embeddings of 24 features, but this IP-Adapter takes 48"
    with pytest.raises(ValueError, match=line):
        ImagePrompt(adapter=wrong, encoder=one.encoder, picture=image, name="ref")
    larger = make("sdxl")
    save(larger, tmp_path / "xl")
    line = "image prompt is an IP-Adapter of a U-Net of its own, but the model is Stable Diffusion XL: "
    with pytest.raises(ValueError, match=line):
        TextToImage.load(tmp_path / "xl").image_prompted([one])
