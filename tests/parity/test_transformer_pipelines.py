"""`TextToImage` draws what diffusers' pipelines of SD3, FLUX.1, PixArt and Z-Image draw, from the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.checkpoint.convert import save_diffusers
from ldm.pipeline import Settings, TextToImage
from ldm.rng import Rng
from tests.families import make

torch.set_num_threads(1)
DYNAMIC = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 4,
    "max_image_seq_len": 64,
}  # fmt: skip
"""FLUX.1 dev's, for as few tokens as the small pictures have."""
UNIPC = {
    "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "prediction_type": "flow_prediction",
    "use_flow_sigmas": True, "flow_shift": 3.0,
}  # fmt: skip
CLASSES = {
    "sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline", "pixart": "PixArtSigmaPipeline",
    "zimage": "ZImagePipeline",
}  # fmt: skip
PROMPT, NEGATIVE, STEPS = "a red apple", "a green apple", 8


def both(kind: str, folder: Path, scheduler: dict[str, Any] | None = None) -> tuple[TextToImage, Any]:
    """Our pipeline and diffusers', of one folder of random weights."""
    import diffusers

    parts = make(kind, folder / "t5")
    save_diffusers(
        folder / "model", network=parts.network, autoencoder=parts.autoencoder, text=parts.text,
        scheduler=scheduler or parts.scheduler,
    )  # fmt: skip
    index = json.loads((folder / "model" / "model_index.json").read_text())
    left = {k: None for k, v in index.items() if v == [None, None]}
    name = "PixArtAlphaPipeline" if kind == "pixart_alpha" else CLASSES[kind.partition("_")[0]]
    theirs = getattr(diffusers, name).from_pretrained(folder / "model", **left)
    theirs.set_progress_bar_config(disable=True)
    return TextToImage.load(folder / "model"), theirs


def drawn(pipe: TextToImage, noise: Tensor, size: tuple[int, int], **settings: Any) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    chosen = Settings(steps=STEPS, size=size, **{"sampler": "euler", **settings})
    return pipe.decode(pipe.latents([PROMPT], chosen, Rng(0, (0,)), x=noise), chosen) / 2 + 0.5


def close(own: Tensor, wanted: Tensor) -> None:
    assert own.shape == wanted.shape
    assert wanted.std() > 0.01
    torch.testing.assert_close(own, wanted.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
@pytest.mark.parametrize("kind", ["sd3", "sd3_no_t5"])
@pytest.mark.parametrize("skip", [(), (1,)])
def test_sd3(kind: str, size: tuple[int, int], skip: tuple[int, ...], tmp_path: Path) -> None:
    """With guidance, and with skip-layer guidance as SD3.5 medium is drawn."""
    ours, theirs = both(kind, tmp_path)
    noise = torch.randn(1, 4, size[0] // 2, size[1] // 2, generator=torch.Generator().manual_seed(1))
    told: dict[str, Any] = {}
    if skip:
        told = {"skip_guidance_layers": list(skip), "skip_layer_guidance_stop": 0.5}
    wanted = theirs(
        PROMPT, negative_prompt=NEGATIVE, latents=noise, height=size[0], width=size[1], num_inference_steps=STEPS,
        guidance_scale=5.0, output_type="pt", **told,
    ).images  # fmt: skip
    own = drawn(ours, noise, size, guidance=5.0, negative=NEGATIVE, skip_layers=skip, skip_interval=(0.01, 0.5))
    close(own, wanted)
    if skip:
        assert (drawn(ours, noise, size, guidance=5.0, negative=NEGATIVE) - own).abs().max() > 0.01


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
@pytest.mark.parametrize("kind", ["flux", "flux_schnell"])
def test_flux(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    """dev is told its guidance, and its shift grows with the picture; schnell has neither."""
    ours, theirs = both(kind, tmp_path, DYNAMIC if kind == "flux" else None)
    noise = torch.randn(1, 4, size[0] // 2, size[1] // 2, generator=torch.Generator().manual_seed(1))
    packed = theirs._pack_latents(noise, 1, 4, *noise.shape[2:])
    wanted = theirs(
        PROMPT, latents=packed, height=size[0], width=size[1], num_inference_steps=STEPS, guidance_scale=3.5,
        output_type="pt", max_sequence_length=512 if kind == "flux" else 256,
    ).images  # fmt: skip
    own = drawn(ours, noise, size, guidance=3.5 if kind == "flux" else 1.0)
    close(own, wanted)
    if kind == "flux":
        assert (drawn(ours, noise, size, guidance=1.0) - own).abs().max() > 1e-3
        skipping = drawn(ours, noise, size, guidance=3.5, skip_layers=(1,), skip_interval=(0.0, 1.0))
        assert (skipping - own).abs().max() > 1e-3, "asked for, so not left out where guidance is told"


def test_whole_times_stay_whole_where_an_edit_gives_its_own(tmp_path: Path) -> None:
    """diffusers' solvers on flow sigmas tell the network times without their fraction, in img2img too."""
    ours, _ = both("sd3", tmp_path, UNIPC)
    told: list[float] = []
    forward = ours.network.forward
    ours.network.forward = lambda x, t, cond, **more: told.extend(t.tolist()) or forward(x, t, cond, **more)  # type: ignore[method-assign,func-returns-value]
    chosen = Settings(sampler="unipc", steps=4, size=16, guidance=1.0)
    ours.latents([PROMPT], chosen, Rng(0, (0,)), start=torch.zeros(1, 4, 8, 8), times=[700.25, 400.75, 100.5])
    assert told
    assert all(t == int(t) for t in told)


def test_sizes_beyond_the_table_are_refused_at_once(tmp_path: Path) -> None:
    ours, _ = both("sd3", tmp_path)
    with pytest.raises(ValueError, match="50x8 patches are more than pos_embed_max_size 12 along a side"):
        ours.check([PROMPT], Settings(size=(200, 32)))


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
@pytest.mark.parametrize("kind", ["pixart", "pixart_alpha"])
def test_pixart(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    """With guidance, under the mask of its captions; the learned variance is left out."""
    ours, theirs = both(kind, tmp_path)
    noise = torch.randn(1, 4, size[0] // 2, size[1] // 2, generator=torch.Generator().manual_seed(1))
    wanted = theirs(
        PROMPT, negative_prompt=NEGATIVE, latents=noise, height=size[0], width=size[1], num_inference_steps=STEPS,
        guidance_scale=4.5, output_type="pt", clean_caption=False, use_resolution_binning=False,
    ).images  # fmt: skip
    close(drawn(ours, noise, size, guidance=4.5, negative=NEGATIVE, sampler="dpmpp_2m"), wanted)


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
@pytest.mark.parametrize("shift", [3.0, 6.0])
@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_zimage(size: tuple[int, int], shift: float, scale: float, tmp_path: Path) -> None:
    """Turbo's shift and the base model's, without guidance and with; theirs counts its scale from 0.

    The negative prompt is of another length than the prompt.
    """
    ours, theirs = both("zimage", tmp_path, DYNAMIC | {"use_dynamic_shifting": False, "shift": shift})
    noise = torch.randn(1, 4, size[0] // 2, size[1] // 2, generator=torch.Generator().manual_seed(1))
    negative = "the quick brown fox jumps over the lazy dog " * 4
    wanted = theirs(
        [PROMPT], negative_prompt=[negative], latents=noise, height=size[0], width=size[1],
        num_inference_steps=STEPS, guidance_scale=scale, output_type="pt",
    ).images  # fmt: skip
    own = drawn(ours, noise, size, guidance=1 + scale, negative=negative)
    close(own, wanted)
    if scale:
        assert (drawn(ours, noise, size, guidance=1.0) - own).abs().max() > 0.01
