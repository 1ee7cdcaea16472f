"""Compiling by block: equal blocks once, the same answers, gradients, modulations of known times, and corrections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ldm.adapters.lora import LoraAdapter, LoraConfig
from ldm.models.compiling import by_block, repeated_blocks, undo
from ldm.models.frozen import store
from ldm.models.network import Network
from ldm.models.presets import UNETS
from ldm.models.transformers.sd3 import SD3Config, SD3Transformer
from ldm.models.transformers.times import known_times
from ldm.models.unet import UNet


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    if torch._dynamo.config.disable:
        pytest.skip("TORCHDYNAMO_DISABLE is set")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def random(net: Network) -> Any:
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.05)
    return net


def unet(layers: int = 2, heads: int | tuple[int, ...] = 2) -> UNet:
    """Transformers at both of two levels, of widths that no other size has at the start."""
    both = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    return random(
        UNet(
            replace(
                UNETS["tiny"], block_out_channels=(48, 96), layers_per_block=layers, attention_head_dim=heads, **both
            )
        )
    )


def sd3(layers: int = 4) -> SD3Transformer:
    config = SD3Config(
        sample_size=8, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=8,
    )  # fmt: skip
    return random(SD3Transformer(config))


def given(net: Network, rows: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    text = torch.randn(rows, 7, 32 if isinstance(net, UNet) else 24)
    cond = {"text": text} if isinstance(net, UNet) else {"text": text, "pooled": torch.randn(rows, 16)}
    return torch.randn(rows, 4, 8, 8), torch.full((rows,), 500.0), cond


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def breaks() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["graph_break"])


@pytest.mark.parametrize(("layers", "kinds"), [(3, 1), (6, 1)])
def test_a_transformer_is_compiled_once_whatever_its_depth(layers: int, kinds: int) -> None:
    """All blocks but the last one, which has no text behind it, are equal."""
    net, counter = sd3(layers).eval(), CompileCounterWithBackend("eager")
    x, t, cond = given(net)
    with torch.no_grad():
        wanted = net(x, t, cond)
        assert by_block(net, counter) == kinds
        near(net(x, t, cond), wanted)
        assert counter.frame_count == kinds
        net(x, t + 1, cond)
        assert counter.frame_count == kinds
        assert len(list(repeated_blocks(net))) == layers - 1
        undo(net)
        assert torch.equal(net(x, t, cond), wanted)
    assert breaks() == {}


def test_known_times_are_used_in_compiled_blocks() -> None:
    """The tables of all steps are read, by the same compiled code in every block."""
    net, counter = sd3(4).eval(), CompileCounterWithBackend("eager")
    x, t, cond = given(net)
    with torch.no_grad():
        wanted = [net(x, t + i, cond) for i in range(3)]
        by_block(net, counter)
        with known_times(net, [500.0, 501.0, 502.0]):
            for i in range(3):
                near(net(x, t + i, cond), wanted[i])
            assert net.known_times is not None
            assert net.known_times.made == 1
            assert counter.frame_count == 1
        near(net(x, t, cond), wanted[0])
        assert counter.frame_count == 2, "once more for blocks that are given the vector itself"
    assert breaks() == {}


@pytest.mark.parametrize(("heads", "kinds"), [(2, 1), ((2, 4), 2)])
def test_a_unet_is_compiled_once_a_count_of_heads(heads: Any, kinds: int) -> None:
    """At both levels, with their own widths; a second size may cost one more each, a third one nothing."""
    net, counter = unet(2, heads).eval(), CompileCounterWithBackend("eager")
    x, t, cond = given(net)
    with torch.no_grad():
        wanted = net(x, t, cond)
        assert by_block(net, counter) == kinds
        assert len(list(repeated_blocks(net))) == 11
        near(net(x, t, cond), wanted)
        assert counter.frame_count == kinds
        wide = torch.randn(3, 4, 16, 8)
        given_wide = {"text": torch.randn(3, 7, 32)}
        found = net(wide, t[:1].expand(3), given_wide)
        known = counter.frame_count
        assert known <= 2 * kinds
        net(torch.randn(4, 4, 8, 24), t[:1].expand(4), {"text": torch.randn(4, 9, 32)})
        assert counter.frame_count == known
        near(net(x, t, net.prepared(cond)), wanted)
        assert counter.frame_count <= known + kinds, "once more each for keys and values that are known"
        undo(net)
        near(net(wide, t[:1].expand(3), given_wide), found)
    assert breaks() == {}


def graphs() -> int:
    """Compilations so far that were kept: a backend is called once more where torch starts over with a symbol fixed."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_three_widths_of_one_count_of_heads_are_compiled_once_and_others_code_is_not_touched() -> None:
    """As Stable Diffusion 1 has them: answers and gradients are the plain blocks', and settings stay as they were."""
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3}
    net = random(UNet(replace(UNETS["tiny"], block_out_channels=(48, 96, 144), layers_per_block=1, **kinds))).train()
    x, t, cond = given(net)
    wanted = net(x, t, cond)
    of = torch.autograd.grad(wanted.square().mean(), list(net.parameters()))
    before = torch._dynamo.config.get_config_copy()
    counter = CompileCounterWithBackend("aot_eager")
    assert by_block(net, counter) == 1
    before_graphs = graphs()
    found = net(x, t, cond)
    assert graphs() - before_graphs == 1
    assert counter.frame_count > 0
    near(found, wanted)
    for a, b in zip(torch.autograd.grad(found.square().mean(), list(net.parameters())), of, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    after = torch._dynamo.config.get_config_copy()
    assert {k for k in before if before[k] != after[k] and not k.endswith("_limit")} == set()
    own = CompileCounterWithBackend("eager")
    for width in (4, 6):
        layer = nn.Linear(width, width)
        torch.compile(layer, backend=own, dynamic=True)(torch.ones(3, width))
    assert own.frame_count == 2, "a user's own layers are compiled for their width"
    assert breaks() == {}


@pytest.mark.parametrize(("name", "kinds", "blocks"), [("sd15", 1, 16), ("sd21", 3, 16), ("sdxl", 2, 70)])
def test_kinds_of_published_networks(name: str, kinds: int, blocks: int) -> None:
    with torch.device("meta"):
        net = UNet(UNETS[name])
    assert (by_block(net, "eager"), len(list(repeated_blocks(net)))) == (kinds, blocks)


@pytest.mark.parametrize("again", ["none", "block"])
@pytest.mark.parametrize("make", [unet, sd3])
def test_gradients(make: Any, again: Any) -> None:
    """Through AOT autograd, with and without recomputing, against the frugal functions of the plain blocks."""
    net = make().train()
    x, t, cond = given(net)
    net.enable_gradient_checkpointing(again)
    wanted = torch.autograd.grad(net(x, t, cond).square().mean(), list(net.parameters()), allow_unused=True)
    by_block(net, "aot_eager")
    found = torch.autograd.grad(net(x, t, cond).square().mean(), list(net.parameters()), allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert breaks() == {}


@pytest.mark.slow  # a minute: forward and backward of every corrected block are traced
@pytest.mark.parametrize(
    ("make", "dora"),
    [(lambda: unet(1), False), (lambda: sd3(5), False), (lambda: sd3(3), True)],
    ids=["unet", "sd3", "dora"],
)
def test_corrections_train_in_compiled_blocks(make: Any, dora: bool) -> None:
    """The base is frozen; gradients of every correction are those without compiling, and equal blocks share code.

    A first block may be compiled once more: nothing before it has a gradient.
    """
    net, counter = make().train(), CompileCounterWithBackend("aot_eager")
    trained = LoraAdapter(LoraConfig(rank=2, dora=dora)).attach(net, [])
    torch.manual_seed(2)
    for p in trained.parameters():
        nn.init.normal_(p, std=0.1)
    x, t, cond = given(net)
    wanted = torch.autograd.grad(trained(x, t, cond).square().mean(), list(trained.parameters()))
    kinds, before = by_block(trained.network, counter), graphs()
    found = torch.autograd.grad(trained(x, t, cond).square().mean(), list(trained.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert counter.frame_count > 0
    assert graphs() - before <= 2 * kinds, (graphs() - before, kinds, len(list(repeated_blocks(net))))
    assert breaks() == {}


def test_a_network_without_equal_blocks_says_so() -> None:
    with pytest.raises(ValueError, match="compile 'blocks': no two blocks of this SD3 transformer are equal"):
        by_block(sd3(2), "eager")


def test_frozen_weights_in_bfloat16_go_with_compiled_blocks() -> None:
    """In bfloat16 they are what is computed with; answers and gradients as without compiling."""
    net = unet(1).requires_grad_(False).train()
    store(net, "bf16")
    x, t, cond = given(net)
    found = []
    for compiled in (False, True):
        if compiled:
            assert by_block(net, "aot_eager") == 1
        own = x.clone().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(own, t, cond)
        out.float().square().mean().backward()
        assert own.grad is not None
        found.append((out.detach().float(), own.grad))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 0.02 * a.norm()
    assert breaks() == {}
