"""Weights that do not train in 2, 1 and a half byte: their values, gradients past them, the bytes that they take."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import frozen, networks, presets
from ldm.models.frozen import Storage, Stored, held_bytes, of_autoencoder, opened, rounded, store, stored_bytes
from ldm.models.text import build_encoder
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae.autoencoder import Autoencoder

torch.set_num_threads(1)
STORAGES = ("bf16", "int8", "nf4")
MOST = {"bf16": 0.52, "int8": 0.28, "nf4": 0.16}
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""As published (arXiv 2305.14314, appendix E)."""


def needs(storage: str) -> None:
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")


def weight_of(layer: Any) -> Tensor:
    return layer.weight


def grad_of(value: Any) -> Tensor:
    return value.grad


def layers() -> list[nn.Module]:
    """Of shapes whose last axis is odd, and whose weights do not fill their last block of 64."""
    return [nn.Linear(37, 24), nn.Linear(64, 32, bias=False), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(16, 12, 1)]


def given(layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.Linear):
        return torch.randn(5, layer.in_features)
    assert isinstance(layer, nn.Conv2d)
    return torch.randn(2, layer.in_channels, 6, 5)


def nearest(weight: Tensor, storage: str) -> Tensor:
    """The closed form of what is stored, in float64."""
    if storage == "bf16":
        return weight.bfloat16().double()
    wide = weight.double()
    if storage == "int8":
        scale = wide.flatten(1).abs().amax(1).view(-1, *[1] * (wide.ndim - 1)) / 127
        return (wide / scale).round() * scale
    code = torch.tensor(NF4, dtype=torch.float64)
    flat = F.pad(wide.flatten(), (0, -wide.numel() % 64)).view(-1, 64)
    scale = flat.abs().amax(1, keepdim=True)
    found = code[((flat / scale)[..., None] - code).abs().argmin(-1)] * scale
    return found.flatten()[: wide.numel()].view_as(wide)


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_stored_is_the_nearest_of_the_values_that_there_are(storage: Any) -> None:
    needs(storage)
    for layer in layers():
        weight = layer.requires_grad_(False).get_parameter("weight").detach().clone()
        store(layer, storage)
        assert isinstance(layer, Stored)
        torch.testing.assert_close(layer.weight.double(), nearest(weight, storage), rtol=1e-6, atol=1e-7)
        assert not any(name == "weight" for name, _ in layer.named_parameters())
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_gradients_pass_as_through_the_whole_weights_in_float64(storage: Any, half: bool) -> None:
    needs(storage)
    for layer in layers():
        layer.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(True)
        twin = copy.deepcopy(layer).double()
        store(layer, storage)
        twin.get_parameter("weight").copy_(weight_of(layer))
        x = given(layer).requires_grad_(True)
        wide = x.detach().double().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = layer(x)
        seed = torch.randn_like(out)
        out.backward(seed)
        twin(wide).backward(seed.double())
        assert x.grad is not None
        assert wide.grad is not None
        atol = 0.05 if half else 1e-5
        torch.testing.assert_close(out.double(), twin(wide), rtol=0, atol=atol)
        torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=atol)
        if layer.bias is not None:
            torch.testing.assert_close(grad_of(layer.bias).double(), grad_of(twin.bias), rtol=0, atol=2 * atol)


def attention_of(x: Tensor, w: Tensor, b: Tensor, out: Tensor, heads: int) -> Tensor:
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (x @ w.T + b).chunk(3, dim=-1))
    mixed = ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return mixed @ out.T


@pytest.mark.parametrize("storage", STORAGES)
def test_joint_attention_of_towers_and_tables(storage: Any) -> None:
    needs(storage)
    attention = nn.MultiheadAttention(16, 4, batch_first=True, bias=True).requires_grad_(False)
    nn.init.normal_(attention.in_proj_bias)
    store(attention, storage)
    assert {type(m).__name__ for m in attention.modules() if isinstance(m, Stored)} == {
        "MultiheadAttention", "NonDynamicallyQuantizableLinear",
    }  # fmt: skip
    x = torch.randn(2, 5, 16, requires_grad=True)
    wide = x.detach().double().requires_grad_(True)
    out = attention(x, x, x, need_weights=False)[0]
    parts = (attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight)
    other = attention_of(wide, *(p.double() for p in parts), heads=4)
    torch.testing.assert_close(out.double(), other, rtol=0, atol=1e-5)
    seed = torch.randn_like(out)
    out.backward(seed)
    other.backward(seed.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=1e-5)  # type: ignore[union-attr]
    table = nn.Embedding(40, 8).requires_grad_(False)
    rows = nearest(table.weight.detach(), "int8" if storage == "nf4" else storage).float()
    store(table, storage)
    torch.testing.assert_close(table(torch.tensor([[3, 39]])), rows[[3, 39]][None])
    torch.testing.assert_close(table.weight, rows)


class Watched:
    """The whole weights that were made, and which of them are still there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[weakref.ref[Tensor]] = []
        whole = Stored.whole

        def watched(layer: Stored, name: str, dtype: torch.dtype) -> Tensor:
            found = whole(layer, name, dtype)
            self.made.append(weakref.ref(found))
            return found

        monkeypatch.setattr(Stored, "whole", watched)

    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.made)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_no_weight_stays_whole_between_forward_and_backward(
    storage: Any, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With recomputing too, where gradients are the same to the last bit."""
    needs(storage)
    torch.manual_seed(0)
    unet = UNet(presets.UNETS["tiny"]).requires_grad_(False).train()
    for p in unet.parameters():
        nn.init.normal_(p, std=0.1)
    store(unet, storage)
    cond = {"text": torch.randn(2, 3, 32)}
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])

    def gradient() -> Tensor:
        own = x.clone().requires_grad_(True)
        unet(own, t, cond).square().sum().backward()
        assert own.grad is not None
        return own.grad

    unet.enable_gradient_checkpointing(again)
    watched = Watched(monkeypatch)
    out = unet(x.clone().requires_grad_(True), t, cond)
    assert watched.made
    assert watched.alive() == 0
    before = len(watched.made)
    out.sum().backward()
    assert len(watched.made) > before  # made again
    assert watched.alive() == 0
    first = gradient()
    unet.enable_gradient_checkpointing(False)
    assert torch.equal(first, gradient())


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_recomputing_keeps_as_little_as_over_whole_weights(storage: Any) -> None:
    """Bytes that the forward allocates and leaves to the backward, as the allocator counts them."""
    torch.manual_seed(0)
    unet = UNet(presets.UNETS["tiny"]).requires_grad_(False).train()
    cond = {"text": torch.randn(2, 3, 32)}
    left: dict[tuple[bool, bool], int] = {}
    for stored in (False, True):
        if stored:
            store(unet, storage)
        for again in (False, True):
            unet.enable_gradient_checkpointing(again)
            x = torch.randn(2, 4, 8, 8, requires_grad=True)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as told:
                out = unet(x, torch.tensor([3, 700]), cond)
            left[stored, again] = sum(event.self_cpu_memory_usage for event in told.key_averages())
            assert out.requires_grad
            del out
    assert left[False, True] < 0.5 * left[False, False]
    assert left[True, True] <= 1.1 * left[False, True]
    assert left[True, False] <= 1.1 * left[False, False]


def test_a_block_that_reads_a_layer_s_weight_sees_it_whole() -> None:
    """The feed-forward layers of transformers compute gelu again in the backward pass, by the second one's weight."""
    from ldm.models.transformers.blocks import FeedForward

    block: Any = FeedForward(8).requires_grad_(False)
    plain: Any = copy.deepcopy(block)
    store(block, "int8")
    for i in (0, 2):
        layer, other = (m.net[i].proj if i == 0 else m.net[i] for m in (block, plain))
        other.weight.copy_(layer.weight)
    x = torch.randn(2, 3, 8)
    grads = []
    for one in (block, plain):
        own = x.clone().requires_grad_(True)
        one(own).square().sum().backward()
        grads.append(own.grad)
    torch.testing.assert_close(grads[0], grads[1])
    with torch.no_grad():
        torch.testing.assert_close(block(x), plain(x))


@pytest.mark.parametrize("storage", STORAGES)
def test_moving_keeps_the_stored_types_and_state_dicts_hold_whole_weights(storage: Any) -> None:
    needs(storage)
    net: Any = nn.Sequential(nn.Conv2d(4, 64, 3), nn.GroupNorm(8, 64)).requires_grad_(False)
    names = set(net.state_dict())
    store(net, storage)
    before = {name: value.dtype for name, value in net[0].named_buffers()}
    values = net[0].weight.clone()
    for change in (torch.bfloat16, torch.float64, torch.float32):
        net.to(change)
        assert {name: value.dtype for name, value in net[0].named_buffers()} == before
        assert torch.equal(net[0].weight, values)
    assert set(net.state_dict()) == names
    assert torch.equal(net.state_dict()["0.weight"], values)
    twin = copy.deepcopy(net)
    assert torch.equal(twin[0].weight, values)
    assert twin[0].weight_data is not net[0].weight_data
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()})


def test_what_trains_and_what_is_used_twice() -> None:
    one, two, third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)
    two.weight = one.weight
    net = nn.ModuleList([one, two, third])
    store(net, "int8")
    assert [isinstance(m, Stored) for m in net] == [False, False, True]
    net = nn.ModuleList([one, two]).requires_grad_(False)
    store(net, "int8")
    assert net[0].weight_data is net[1].weight_data
    assert held_bytes(net) == stored_bytes(nn.ModuleList([nn.Linear(8, 8).requires_grad_(False)]), "int8") + 8 * 4
    with opened(net):
        assert one.weight is one.weight


def test_a_missing_package_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"frozen: 'nf4' needs the package bitsandbytes: pip install 'ldm\[bits"):
        frozen.check_storage("nf4")
    frozen.check_storage("int8")


REAL = {
    "sd15": "sd15", "sd21": "sd21", "sdxl": "sdxl", "sd35_medium": "sd3", "flux_dev": "flux",
    "pixart_sigma": "pixart", "zimage": "zimage",
}  # fmt: skip
"""Networks and their text encoders."""


def float32_bytes(*modules: nn.Module) -> int:
    return 4 * sum(v.numel() for m in modules for v in (*m.parameters(), *m.buffers()))


@pytest.mark.parametrize("family", REAL)
def test_the_parts_of_published_models_take_a_half_a_quarter_and_a_seventh(family: str) -> None:
    """All frozen parts together by their real shapes, and the network alone."""
    vae_of = {"sd35_medium": "kl_f8_sd3", "flux_dev": "kl_f8_flux", "zimage": "kl_f8_flux"}
    with torch.device("meta"):
        network = networks.build(presets.PRESETS.get(family) or presets.UNETS[family])
        text = [build_encoder(config).model for config in presets.TEXTS[REAL[family]]]
        vae = Autoencoder(presets.AUTOENCODERS[vae_of.get(family, "kl_f8")])
    for part in (network, *text, vae):
        part.requires_grad_(False)
    whole = float32_bytes(network, *text, vae)
    for name, most in MOST.items():
        storage = cast("Storage", name)
        total = sum(stored_bytes(part, storage) for part in (network, *text))
        assert total + stored_bytes(vae, of_autoencoder(storage)) <= most * whole, storage
        table = sum(value.numel() for value in network.buffers())  # of positions: no weights
        own = stored_bytes(network, storage) - 2 * table
        assert own <= most * (float32_bytes(network) - 4 * table), storage


@pytest.mark.parametrize("storage", STORAGES)
def test_bytes_are_counted_as_they_are_held(storage: Any) -> None:
    """Exactly, for a network with the widths of SD 1.5's finer levels: convolutions and all."""
    needs(storage)
    config = UNetConfig(
        sample_size=8, block_out_channels=(320, 640), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=768,
        attention_head_dim=8,
    )  # fmt: skip
    unet = UNet(config).requires_grad_(False)
    whole = float32_bytes(unet)
    told = stored_bytes(unet, storage)
    assert told == stored_bytes(copy.deepcopy(unet).to("meta"), storage)
    store(unet, storage)
    assert held_bytes(unet) == told
    assert told <= MOST[storage] * whole
    assert rounded(torch.zeros(2, 3))[1].isfinite().all()
