"""The same numbers for fewer products: doubling convolutions, Winograd's, and equal rows of guidance computed once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import winograd
from ldm.models.layers import Conv3x3, Upsample, doubled_convolution, unchanging
from ldm.models.presets import UNETS
from ldm.models.unet import UNet
from ldm.models.winograd import Transforms


def far(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("bias", [True, False])
def test_a_doubling_convolution_is_that_of_the_doubled_picture(bias: bool) -> None:
    x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5, 3, 4), (6, 5, 3, 3)))
    added = torch.randn(6, dtype=torch.float64, requires_grad=True) if bias else None
    out = doubled_convolution(x, weight, added)
    exact = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, added, padding=1)
    assert far(out, exact) < 1e-14
    leaves, toward = [v for v in (x, weight, added) if v is not None], torch.randn_like(exact)
    ours, theirs = (torch.autograd.grad((v * toward).sum(), leaves) for v in (out, exact))
    assert max(far(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-14


def test_where_an_upsampling_layer_is_a_transposed_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("ldm.models.layers.doubled_convolution", lambda x, *_: seen.append(x.shape[1]) or x)
    layer, x = Upsample(16), torch.randn(1, 16, 3, 3)
    layer(x)
    assert seen == [16]
    layer(x, (7, 7))  # an odd side
    layer(torch.randn(1, 16, 2, 2)[..., :1])  # 2 pixels under 16 channels
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert seen == [16]


@torch.no_grad()
def test_a_correction_of_an_upsampling_layer_sees_the_doubled_picture() -> None:
    layer, x = Upsample(16), torch.randn(1, 16, 3, 3)
    plain, doubled = layer(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert far(plain, layer.conv(doubled)) < 1e-6
    layer.conv.register_forward_hook(lambda _, args, out: out + args[0])  # as LoRA corrects a layer
    assert torch.equal(layer(x), plain + doubled)


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 2, 2), (3, 6, 4)])
def test_winograds_convolution_is_the_convolution(batch: int, height: int, width: int) -> None:
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((batch, 5, height, width), (7, 5, 3, 3), (7,)))
    for b in (bias, None):
        exact = F.conv2d(x, weight, b, padding=1)
        assert far(winograd.convolve(x, winograd.transformed(weight), b), exact) < 1e-14


@torch.no_grad()
def test_wide_layers_transform_unchanging_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    plain = winograd.transformed
    monkeypatch.setattr(winograd, "transformed", lambda w: (made.append(w), plain(w))[1])
    layer, x = Conv3x3.of(640, 320), torch.randn(2, 640, 10, 10)
    exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)  # type: ignore[union-attr]
    with unchanging(layer, 4):
        first, second = layer(x), layer(x)
        assert len(made) == 1
        assert torch.equal(first, second)
        assert far(first, exact) < 2e-6
        layer(x[..., :9]), layer(x[:, :, :2, :2])  # odd, and few tiles
        with torch.enable_grad():
            assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    assert len(made) == 1
    layer.weight += 1
    changed = F.conv2d(x, layer.weight, layer.bias, padding=1)
    assert torch.equal(layer(x), changed)
    with unchanging(layer, 4):
        assert far(layer(x), changed) < 2e-6
    with unchanging(layer, 3):  # too few calls
        assert torch.equal(layer(x), changed)
    assert len(made) == 2


def test_transformed_weights_keep_to_their_room() -> None:
    a, b = torch.randn(2, 4, 4, 3, 3)
    kept = Transforms(budget=4 * 16 * 4 * 4)
    assert kept.of(a) is kept.of(a) is not None
    assert kept.of(b) is None


def unet(**changes: Any) -> UNet:
    net = UNet(replace(UNETS["tiny"], norm_num_groups=4, **changes)).double().eval()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net


LAYOUTS: dict[str, dict[str, Any]] = {
    "text at the finest level": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
    "text at the coarsest level": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "text in the middle": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    },
    "no text": {
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "mid_block_type": "UNetMidBlock2D",
    },
    "more channels and classes": {"in_channels": 6, "num_class_embeds": 3},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("known", [False, True])
@torch.no_grad()
def test_equal_rows_are_computed_once_up_to_the_text(layout: str, known: bool) -> None:
    net, parts = unet(**LAYOUTS[layout]), 3
    x, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([5, 700])
    text = torch.randn(2 * parts, 7, 32, dtype=torch.float64)
    cond = {"kv": net.keys_values(text)} if known and net.transformers() else {"text": text}
    if "classes" in layout:
        cond |= {
            "concat": torch.randn(2, 2, 8, 8).double().repeat(parts, 1, 1, 1),
            "class": torch.tensor([0, 2] * parts),
        }
    x, t = x.repeat(parts, 1, 1, 1), t.repeat(parts)
    rows: list[int] = []
    net.conv_in.register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    told = {**cond, "copies": torch.empty(parts, 0)}
    once, plain = net(x, t, told), net(x, t, cond)
    assert rows == [2, 6]
    assert once.shape == plain.shape
    assert far(once, plain) < 1e-13
    assert far(net.middle(x, t, told), net.middle(x, t, cond)) < 1e-13
    if layout != "no text":
        assert far(plain[:2], plain[2:4]) > 1e-3, "the text does not matter: nothing was tested"


@torch.no_grad()
def test_attention_that_is_looked_at_has_all_rows() -> None:
    net = unet(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"))
    text = torch.randn(4, 7, 32, dtype=torch.float64)
    x, t = torch.randn(2, 4, 8, 8, dtype=torch.float64).repeat(2, 1, 1, 1), torch.full((4,), 9)
    rows: list[int] = []
    first: Any = net.transformers()[0].transformer_blocks[0]

    def control(weights: Tensor) -> Tensor:
        rows.append(len(weights))
        return weights

    first.attn1.control = first.attn2.control = control
    net(x, t, {"text": text, "copies": torch.empty(2, 0)})
    assert rows == [4, 4]
