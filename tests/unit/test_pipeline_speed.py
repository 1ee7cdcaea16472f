"""Sampling waits for nothing on the host; options that save memory or time change no picture."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.diffusion.prediction import V
from ldm.diffusion.process import Process
from ldm.models.attention import attention, sliced
from ldm.models.presets import UNETS
from ldm.models.text import TextConfig, TextTower
from ldm.models.unet import UNet
from ldm.models.vae.autoencoder import Autoencoder
from ldm.models.vae.latents import LatentCodec
from ldm.pipeline import Settings, TextToImage
from ldm.rng import Rng
from tests import miniature

PROMPTS = ["a red dot", "a blue bar"]


@pytest.fixture(scope="module")
def pipeline() -> TextToImage:
    torch.manual_seed(0)
    unet = UNet(UNETS["tiny"])
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    tower = TextTower(TextConfig(width=32, heads=2, layers=2, context_length=12, vocab_size=4096, bpe="emoji"))
    codec = LatentCodec.of(Autoencoder(miniature.VAE).eval().requires_grad_(False))
    return TextToImage(unet.eval().requires_grad_(False), codec, [tower], Process(prediction=V()))


def draw(pipeline: TextToImage, **settings: Any) -> Tensor:
    return pipeline.sample(PROMPTS, settings=Settings(**{"steps": 2, "guidance": 2.0} | settings))


class Reads(TorchDispatchMode):
    """Counts values that the host reads out of tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m", "heun", "unipc", "lcm", "euler"])
def test_no_step_reads_a_value(pipeline: TextToImage, sampler: str) -> None:
    """A GPU would be waited for at each; the check that all was finite comes after the last step."""
    counts: list[int] = []
    with Reads() as reads, torch.no_grad():
        settings = Settings(sampler=sampler, steps=5)
        pipeline.latents(PROMPTS, settings, Rng(0, (0, 1)), lambda *_: counts.append(reads.count))
    assert len(counts) == 5
    assert counts[0] == counts[-1], counts


def test_the_text_is_projected_once_for_all_steps(pipeline: TextToImage) -> None:
    calls: list[int] = []
    layer = pipeline.unet.transformers()[0].transformer_blocks[0].attn2.to_k  # type: ignore[union-attr]
    hook = layer.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    draw(pipeline, steps=6)
    hook.remove()
    assert len(calls) == 2  # the prompts', and the negative prompt's


def test_known_keys_draw_the_same_picture(pipeline: TextToImage, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = draw(pipeline, steps=4)
    monkeypatch.setattr("ldm.pipeline.conditioning.PREPARED_BYTES", 0)
    assert torch.equal(draw(pipeline, steps=4), quick)


@pytest.mark.parametrize("how", [{"queries": 7}, {"slices": True}, {"tile": 64}, {"weights": True}, {"long": True}])
def test_options_change_no_picture(pipeline: TextToImage, how: dict[str, Any]) -> None:
    torch.testing.assert_close(draw(pipeline, **how), draw(pipeline), rtol=0, atol=2e-5)


def test_slices_of_attention_are_the_whole() -> None:
    q, k, v = torch.randn(2, 13, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 8)
    mask = torch.randn(1, 3, 13, 7)
    whole = attention(q, k, v, mask)
    with sliced(4):
        torch.testing.assert_close(attention(q, k, v, mask), whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(attention(q, k, v), attention(q, k, v), rtol=0, atol=0)
    with pytest.raises(ValueError, match="at least 1 query, got 0"), sliced(0):
        pass


def test_offload_on_the_cpu_does_nothing_and_says_so(pipeline: TextToImage, caplog: pytest.LogCaptureFixture) -> None:
    expected = draw(pipeline)
    with caplog.at_level(logging.INFO):
        assert torch.equal(draw(pipeline.offload("cpu")), expected)
    assert "nothing to do" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("tile", 8), ("queries", 0)])
def test_mistakes_are_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        Settings(**{name: value})


@pytest.mark.gpu
class TestOnTheGpu:
    def test_no_step_synchronises(self, pipeline: TextToImage) -> None:
        pipeline.to("cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            net, process = pipeline.unet, pipeline.process
            with torch.no_grad():
                x, t = torch.randn(2, 4, 8, 8, device="cuda"), torch.full((2,), 5.0, device="cuda")
                process.denoiser(net)(x, t, {"text": torch.randn(2, 7, 32, device="cuda")})
        finally:
            torch.cuda.set_sync_debug_mode("default")
            pipeline.to("cpu")

    @pytest.mark.parametrize("how", ["offload", "graphs", "tf32", "bf16", "fp16"])
    def test_equals_the_cpu(self, pipeline: TextToImage, how: str) -> None:
        expected = draw(pipeline)
        on = TextToImage(
            pipeline.unet, pipeline.codec, pipeline.text, pipeline.process,
            precision=how if how in ("bf16", "fp16") else "fp32",
        )  # fmt: skip
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if how == "tf32" else "highest")
        try:
            on = on.offload("cuda") if how == "offload" else on.to("cuda")
            made = draw(on.compile() if how == "graphs" else on)
            assert (made - expected).abs().max() < (0.1 if how in ("bf16", "fp16", "tf32") else 1e-3)
            if how == "offload":
                assert next(on.unet.parameters()).device.type == "cpu"
        finally:
            torch.set_float32_matmul_precision(before)
            on.to("cpu")
