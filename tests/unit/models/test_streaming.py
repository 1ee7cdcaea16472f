"""Blocks that come and go: the same bits, no more of them than allowed, and no byte moved that need not be."""

from __future__ import annotations

import copy
import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.adapters.lora import LoraAdapter, LoraConfig
from ldm.models import compiling
from ldm.models.keeping import keeping
from ldm.models.network import Network
from ldm.models.networks import build
from ldm.models.streaming import ALIGNED, Call, resident, stop, stream
from ldm.models.transformers import presets
from ldm.models.transformers.times import known_times
from ldm.models.unet import UNet
from tests.counting import Counted
from tests.unit.models.test_network import NETS, inputs

FAMILIES = ["unet", "unet, told sizes", "sd3", "flux", "pixart", "zimage"]


def made(name: str) -> Network:
    torch.manual_seed(0)
    network = NETS[name]()
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    return network.eval().requires_grad_(False)


@pytest.fixture(params=FAMILIES)
def network(request: pytest.FixtureRequest) -> Network:
    return made(request.param)


def called(network: Network) -> Tensor:
    with torch.no_grad():
        return network(*inputs(network))


def gradients(network: Network) -> list[Tensor]:
    """Of the latents and of the text: all that an adapter's gradients are made of."""
    x, t, cond = inputs(network)
    x, text = x.requires_grad_(), cond["text"].requires_grad_()
    network(x, t, cond | {"text": text}).square().sum().backward()
    assert x.grad is not None
    assert text.grad is not None
    return [x.grad, text.grad]


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def sizes(network: Network) -> dict[str, int]:
    """Bytes of each block, every tensor's rounded up."""
    return {
        name: sum(-(-t.numel() * t.element_size() // ALIGNED) * ALIGNED for t in (*b.parameters(), *b.buffers()))
        for name, b in network.blocks()
    }


def test_those_that_stay_are_spread_evenly() -> None:
    for blocks in range(1, 40):
        for count in range(1, blocks):
            stay = resident(blocks, count)
            assert len(set(stay)) == len(stay) == max(0, count - 2)
            assert all(0 <= i < blocks for i in stay)
            gaps = [b - a for a, b in itertools.pairwise(stay)]
            assert not gaps or max(gaps) - min(gaps) <= 1
        assert resident(blocks, blocks) == resident(blocks, blocks + 1) == list(range(blocks))


def test_calls_are_the_same_and_move_each_block_once(network: Network) -> None:
    wanted, size = called(network), sizes(network)
    for count in sorted(n for n in {1, 2, 3, len(size) - 1} if n < len(size)):
        device = Counted()
        streaming = stream(network, count, "cpu", device)
        moving = streaming.moving
        assert len(moving) == len(size) - max(0, count - 2)
        for _ in range(2):
            assert torch.equal(called(network), wanted)
        before = len(device.sizes)
        for _ in range(3):
            assert torch.equal(called(network), wanted)
        assert sorted(device.sizes[before:]) == sorted(3 * [size[name] for name in moving])
        assert device.most == min(count, 2), "memory that was alive at once, whoever held it"
        assert device.most + len(size) - len(moving) <= count
        assert len(streaming.held) <= 2
        stop(network)
        assert device.now == 0


@pytest.mark.parametrize("recompute", ["none", "block", "transformer"])
def test_gradients_are_the_same_and_weights_are_not_kept(network: Network, recompute: Any) -> None:
    """Without recomputing, too: autograd keeps no weight, and the backward pass fetches it again."""
    if recompute == "transformer" and not isinstance(network, UNet):
        pytest.skip("the U-Net's own")
    network.train()
    wanted, blocks = gradients(network), len(list(network.blocks()))
    network.enable_gradient_checkpointing(recompute)
    for count in (1, 2, 3) if recompute == "none" else (1,):
        if count >= blocks:
            continue
        device = Counted()
        moving = stream(network, count, "cpu", device).moving
        assert equal(gradients(network), wanted)
        before = len(device.sizes)
        assert equal(gradients(network), wanted)
        assert len(device.sizes) - before == 2 * (len(moving) - min(count, 2)), "two are there where it turns round"
        assert device.most == min(count, 2)
        called(network)  # others, without gradients, in between
        assert equal(gradients(network), wanted)
        stop(network)
        assert device.now == 0


def test_casts_of_weights_are_not_kept_either(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast autograd would keep the cast of each weight: half of the weights' memory, until the backward."""
    network.train()

    def cast_gradients() -> Tensor:
        x, t, cond = inputs(network)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = network(x.requires_grad_(), t, cond)
        out.float().square().sum().backward()
        assert x.grad is not None
        return x.grad

    wanted, device = cast_gradients(), Counted()
    shapes = {tuple(p.shape) for _, b in network.blocks() for p in b.parameters() if p.ndim > 1}
    shapes |= {tuple(reversed(shape)) for shape in shapes if len(shape) == 2}
    kept: list[tuple[Tensor, Any]] = []
    keep = Call._keep
    monkeypatch.setattr(Call, "_keep", lambda self, value: kept.append((value, keep(self, value))) or kept[-1][1])
    stream(network, 1, "cpu", device)
    assert torch.equal(cast_gradients(), wanted)
    assert device.most == 1
    casts = [again for value, again in kept if again is not None and value.dtype == torch.bfloat16]
    assert len(casts) >= len(list(network.blocks()))
    found = [value for value, again in kept if again is None and value.dtype == torch.bfloat16]
    assert not [one.shape for one in found if tuple(one.shape) in shapes and not one.requires_grad]


def test_what_is_kept_is_freed_without_a_backward_pass_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved outputs that kept themselves would live for ever."""
    network, seen, device = made("pixart"), list[Any](), Counted()
    network.train()
    stream(network, 1, "cpu", device)
    detach = Tensor.detach

    def watched(self: Tensor) -> Tensor:
        found = detach(self)
        seen.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Tensor, "detach", watched)
    x, t, cond = inputs(network)
    out = network(x.requires_grad_(), t, cond)
    monkeypatch.undo()
    assert sum(one() is not None for one in seen) > 20
    del out, x, cond
    assert not [one for one in seen if one() is not None]


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_hooks_inside_of_a_block_leave_its_weights_to_it(name: str) -> None:
    """Torch asks the innermost of the hooks on saved tensors alone."""
    network, device = made(name), Counted()
    network.train()
    wanted = gradients(network)

    def some(value: Tensor) -> Any:
        return (lambda: value.float()) if value.ndim == 4 else None

    def around(module: nn.Module, run: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            with keeping(some):
                return run(*args, **more)

        return call

    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.forward = around(module, module.forward)  # type: ignore[method-assign]
    stream(network, 1, "cpu", device)
    assert equal(gradients(network), wanted)
    assert device.most == 1


def test_all_of_them_move_nothing(network: Network) -> None:
    device, blocks = Counted(), len(list(network.blocks()))
    assert not stream(network, blocks, "cpu", device).moving
    called(network)
    gradients(network)
    assert not device.sizes


def test_a_block_that_was_not_fetched_cannot_be_used() -> None:
    network = made("flux")
    streaming = stream(network, 1, "cpu", Counted())
    called(network)
    away = next(name for name in streaming.moving if name not in streaming.held)
    layer = network.get_submodule(away).get_submodule("attn.to_q")
    x = torch.ones(1, 2, network.config.width)
    assert layer(x).isnan().all(), "kernels of the CPU check no shapes: what is away is not a number here"
    network.fetch(layer)
    assert layer(x).isfinite().all()


def test_what_is_prepared_and_known_times(network: Network) -> None:
    """Keys, values and modulations of blocks are made outside of the blocks' calls."""
    x, _, cond = inputs(network, rows=1)
    with torch.no_grad(), known_times(network, [700.0, 3.0]):
        ready = network.prepared(cond)
        wanted = [network(x, torch.tensor([time]), ready) for time in (700.0, 3.0)]
    device = Counted()
    stream(network, 1, "cpu", device)
    with torch.no_grad(), known_times(network, [700.0, 3.0]):
        ready = network.prepared(cond)
        assert equal([network(x, torch.tensor([time]), ready) for time in (700.0, 3.0)], wanted)
    assert device.most == 1


def test_other_ways_through_the_blocks_are_learned() -> None:
    """Blocks that are left out, and every second call whole, as skip-layer guidance has them."""
    network: Any = made("flux")
    x, t, cond = inputs(network)
    with torch.no_grad():
        wanted = [network(x, t, cond), network(x, t, cond, skip=frozenset({1, 2}))]
        device = Counted()
        stream(network, 2, "cpu", device)
        for _ in range(3):
            assert equal([network(x, t, cond), network(x, t, cond, skip=frozenset({1, 2}))], wanted)
        before = len(device.sizes)
        for _ in range(3):
            network(x, t, cond, skip=frozenset({1, 2}))
    assert device.most == 2
    assert len(device.sizes) - before <= 3, "the two that run fit, once their order is known"


def test_nothing_is_lost_of_what_is_away(network: Network, tmp_path: Path) -> None:
    """The state dict, a file of it, and a copy of the network, with blocks away; also after streaming."""
    wanted = {name: value.clone() for name, value in network.state_dict().items()}
    answer = called(network)
    stream(network, 1, "cpu")
    called(network)
    found = network.state_dict()
    assert found.keys() == wanted.keys()
    assert equal(list(found.values()), list(wanted.values()))
    save_file({name: value.contiguous() for name, value in found.items()}, tmp_path / "x.safetensors")
    assert all(torch.equal(value, wanted[name]) for name, value in load_file(tmp_path / "x.safetensors").items())
    twin = copy.deepcopy(network)
    assert twin.streaming is None
    assert torch.equal(called(twin), answer)
    stop(network)
    assert network.streaming is None
    assert torch.equal(called(network), answer)
    assert equal(list(network.state_dict().values()), list(wanted.values()))


def test_what_is_written_into_weights_stays() -> None:
    """Into blocks that are on the device, away, and on their way, as merging and loading do."""
    network, other = made("flux"), made("flux")
    streaming = stream(network, 2, "cpu")
    called(network)
    assert len(streaming.held) == 2, "the last one, and the first one on its way"
    assert len(streaming.moving) > 2
    with torch.no_grad():
        for one in (network, other):
            for name, _ in other.blocks():
                weight = one.get_submodule(f"{name}.attn.to_q").get_parameter("weight")
                weight.detach().mul_(1.5)
    wanted = called(other)
    for _ in range(2):
        assert torch.equal(called(network), wanted)
    with torch.no_grad():
        other.load_state_dict({name: value + 0.01 for name, value in other.state_dict().items()})
        network.load_state_dict(other.state_dict())
    wanted = called(other)
    for _ in range(2):
        assert torch.equal(called(network), wanted)


def test_what_trains_stays_where_it_is() -> None:
    """The same storage under the optimizer; a block that is set to train while it is away is refused."""
    network = made("pixart")
    trained = [b.get_submodule("attn1.to_q").get_parameter("weight").requires_grad_() for _, b in network.blocks()]
    places = [p.data_ptr() for p in trained]
    wanted = torch.autograd.grad(network(*inputs(network)).square().sum(), trained)
    stream(network, 1, "cpu", Counted())
    for _ in range(2):
        found = torch.autograd.grad(network(*inputs(network)).square().sum(), trained)
        assert equal(list(found), list(wanted))
        assert [p.data_ptr() for p in trained] == places
    network.requires_grad_(True)
    with pytest.raises(ValueError, match=r"weights of transformer_blocks.1 were moved, replaced or set to train"):
        called(network)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_of_corrections(network: Network, recompute: bool, dora: bool) -> None:
    """LoRA and DoRA, put on a network before it is streamed or after: the same start and gradients, bit by bit."""

    def trained(one: Network, *, before: bool = False, after: bool = False) -> list[Tensor]:
        device = Counted()
        if before:
            stream(one, 1, "cpu")
        torch.manual_seed(3)
        net = LoraAdapter(LoraConfig(rank=2, dora=dora)).attach(one, [])
        if after:
            stream(one, 1, "cpu", device)
        start = [p.detach().clone() for p in net.parameters()]
        for p in net.parameters():
            nn.init.normal_(p, std=0.3)
        one.enable_gradient_checkpointing(recompute)
        net(*inputs(one)).square().sum().backward()
        found = [p.grad for p in net.parameters() if p.grad is not None]
        assert sum(bool(g.any()) for g in found) > 0.8 * len(start), "SD3's last block drops what it makes of the text"
        assert device.most == after
        return [*start, *found]

    wanted = trained(copy.deepcopy(network))
    assert equal(trained(copy.deepcopy(network), before=True), wanted)
    assert equal(trained(copy.deepcopy(network), after=True), wanted)


def test_layouts_types_and_buffers() -> None:
    """Memory in another order, half precision, numbers without axes, and buffers come and go as they are."""
    network = made("unet").to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for _, block in network.blocks():
        block.register_buffer("one", torch.tensor(3.0))
        block.register_buffer("turned", torch.arange(12.0).view(3, 4).t())
        block.register_buffer("wide", torch.arange(3.0).expand(2, 3))
    before = {name: (t.clone(), t.stride()) for name, t in network.state_dict().items() if "wide" not in name}
    wanted = called(network)
    stream(network, 2, "cpu")
    assert torch.equal(called(network), wanted)
    for name, tensor in network.state_dict().items():
        if "wide" not in name:
            assert torch.equal(tensor, before[name][0])
            assert tensor.stride() == before[name][1]
            assert tensor.data_ptr() % 64 == 0
        else:
            assert torch.equal(tensor, torch.arange(3.0).expand(2, 3))


@pytest.mark.parametrize("first", ["stream", "compile"])
def test_compiled_blocks(first: str) -> None:
    """One compilation for all equal blocks that come and go, whichever is asked for first."""
    if torch._dynamo.config.disable:
        pytest.skip("TORCHDYNAMO_DISABLE is set")
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    network = build(presets.PIXART_TINY.__class__(**{**vars(presets.PIXART_TINY), "num_layers": 4}))
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    network.eval().requires_grad_(False)
    wanted, backward, device = called(network), gradients(network), Counted()
    counter = CompileCounterWithBackend("aot_eager")
    steps = [lambda: stream(network, 2, "cpu", device), lambda: compiling.by_block(network, counter)]
    for step in steps if first == "stream" else reversed(steps):
        step()
    for _ in range(2):
        torch.testing.assert_close(called(network), wanted, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    for a, b in zip(gradients(network), backward, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert device.most == 2
    compiling.undo(network)
    assert torch.equal(called(network), wanted)
    stop(network)
    assert all(block._compiled_call_impl is None for block in network.compiled_blocks())
    torch._dynamo.reset()


class Odd(Tensor):
    """Another kind of tensor."""


def test_what_is_refused() -> None:
    network = made("pixart")
    for count in (0, -1):
        with pytest.raises(ValueError, match=rf"blocks_on_device must be at least 1, or null for all, got {count}"):
            stream(network, count, "cpu")
    network.get_submodule("transformer_blocks.0").register_buffer("odd", torch.zeros(3).as_subclass(Odd))
    with pytest.raises(ValueError, match=r"blocks_on_device: transformer_blocks.0.odd is a Odd, which cannot be"):
        stream(network, 1, "cpu")
