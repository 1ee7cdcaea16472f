"""The transformers' seam: prepared conditioning, blocks, recomputing, skipping, first weights, errors, bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.models import onednn
from ldm.models.transformers import presets
from ldm.models.transformers.base import Transformer
from ldm.models.transformers.flux import FluxTransformer
from ldm.models.transformers.pixart import PixArtTransformer
from ldm.models.transformers.sd3 import SD3Transformer

ALPHA = replace(presets.PIXART_TINY, use_additional_conditions=True)
NETS: dict[str, Callable[[], Any]] = {
    "sd3": lambda: SD3Transformer(presets.SD3_TINY),
    "flux": lambda: FluxTransformer(presets.FLUX_TINY),
    "pixart": lambda: PixArtTransformer(presets.PIXART_TINY),
    "alpha": lambda: PixArtTransformer(ALPHA),
}


def network(name: str) -> Any:
    """With random weights everywhere: fresh ones give zeros."""
    torch.manual_seed(0)
    net = NETS[name]()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def conditions(name: str, rows: int = 2) -> dict[str, Tensor]:
    cond = {"text": torch.randn(rows, 5, 20)}
    if name in ("sd3", "flux"):
        cond["pooled"] = torch.randn(rows, 12)
    if name == "flux":
        cond["guidance"] = torch.tensor([3.5, 1.0])[:rows]
    if name in ("pixart", "alpha"):
        cond["mask"] = torch.tensor([[True, True, True, False, False], [True] * 5])[:rows]
    if name == "alpha":
        cond |= {"resolution": torch.full((rows, 2), 64.0), "aspect_ratio": torch.ones(rows)}
    return cond


def inputs(name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    return torch.randn(2, 4, 8, 6), torch.tensor([7.0, 801.0]), conditions(name)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_prepared_conditioning_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    net = network(name).to(dtype)
    x, t, cond = inputs(name)
    known = net.prepared(cond)
    assert net.needs <= cond.keys()
    assert net.known in known
    assert "text" not in known
    assert all(value.shape[0] == 2 for value in known.values())
    assert torch.equal(net(x, t, known), net(x, t, cond))
    assert not torch.equal(net(x, t, cond), net(x, t, cond | {"text": -cond["text"]}))


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_one_time_for_all_rows(name: str) -> None:
    net = network(name)
    x, _, cond = inputs(name)
    one, each = net(x, torch.tensor([300.0]), cond), net(x, torch.tensor([300.0, 300.0]), cond)
    assert (one - each).norm() < 1e-6 * each.norm()
    assert not torch.equal(one, net(x, torch.tensor([301.0]), cond))


@pytest.mark.parametrize("name", NETS)
def test_blocks_hold_every_parameter_of_the_stacks(name: str) -> None:
    net = network(name)
    named = {f"{prefix}.{key}" for prefix, block in net.blocks() for key, _ in block.named_parameters()}
    assert named == {key for key, _ in net.named_parameters() if "transformer_blocks." in key}
    assert next(prefix for prefix, _ in net.blocks()) == "transformer_blocks.0"
    assert all(net.get_submodule(prefix) is block for prefix, block in net.blocks())


@pytest.mark.parametrize("name", NETS)
def test_recomputing_gives_the_same_gradients(name: str) -> None:
    net = network(name).train()
    x, t, cond = inputs(name)
    ran: list[str] = []
    for prefix, block in net.blocks():
        block.register_forward_pre_hook(lambda *_, prefix=prefix: ran.append(prefix))
    grads = []
    for on in ("none", True):
        ran.clear()
        net.zero_grad()
        net.enable_gradient_checkpointing(on)
        net(x, t, cond).square().sum().backward()
        grads.append({key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None})
        assert len(ran) == (2 if on is True else 1) * len(list(net.blocks()))
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])
    with pytest.raises(ValueError, match="gradient_checkpointing 'transformer' is not one of"):
        net.enable_gradient_checkpointing("transformer")


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_without_a_block_is_the_network_with_that_block_as_identity(name: str) -> None:
    net = network(name)
    x, t, cond = inputs(name)
    whole = net(x, t, cond)
    skipped = net.without([1])(x, t, net.prepared(cond))
    assert not torch.equal(whole, skipped)
    assert torch.equal(net(x, t, cond), whole)
    block = net.transformer_blocks[1]
    block.forward = (lambda x, *_: x) if name in ("pixart", "alpha") else (lambda x, text, *_: (x, text))
    assert torch.equal(net(x, t, cond), skipped)
    with pytest.raises(ValueError, match="block 9 cannot be skipped: there are blocks 0 to"):
        net.without([0, 9])


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_fresh_networks(name: str) -> None:
    """They give zeros; SD3's and FLUX's blocks are the identity (adaLN-zero), PixArt's cross-attention adds nothing."""
    torch.manual_seed(0)
    net = NETS[name]()
    x, t, cond = inputs(name)
    assert torch.equal(net(x, t, cond), torch.zeros(2, 8 if name in ("pixart", "alpha") else 4, 8, 6))
    nn.init.normal_(net.proj_out.weight)
    if name in ("pixart", "alpha"):
        assert torch.equal(net(x, t, cond), net(x, t, cond | {"text": torch.randn(2, 5, 20)}))
        assert not torch.equal(net(x, t, cond), net.without([0])(x, t, cond))
    else:
        assert net(x, t, cond).norm() > 0
        count = len(list(net.blocks()))
        assert torch.equal(net(x, t, cond), net.without(range(count))(x, t, cond))


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_half_precision_is_near(name: str) -> None:
    """Weights in bfloat16, and float32 weights under autocast; bounds are a few of bfloat16's roundings (2^-9)."""
    net = network(name)
    x, t, cond = inputs(name)
    wanted = net(x, t, cond)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(x, t, cond)
    assert (mixed.float() - wanted).norm() < 0.03 * wanted.norm()
    half = net.bfloat16()(x, t, cond)
    assert half.dtype == torch.bfloat16
    assert (half.float() - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("name", NETS)
def test_mistakes_are_named(name: str) -> None:
    net: Transformer = NETS[name]()
    x, t, cond = inputs(name)
    with pytest.raises(ValueError, match="takes 4 channels, got 3"):
        net(x[:, :3], t, cond)
    with pytest.raises(ValueError, match=r"multiples of 2, got \(7, 6\)"):
        net(x[:, :, :7], t, cond)
    with pytest.raises(ValueError, match=r"cond 'text' has 3 channels, \w+ takes 20"):
        net(x, t, cond | {"text": torch.randn(2, 5, 3)})
    for key in net.needs:
        with pytest.raises(ValueError, match=f"needs cond '{key}'"):
            net.prepared({k: v for k, v in cond.items() if k != key})
    if name != "flux":
        with pytest.raises(ValueError, match="guidance_embeds"):
            net(x, t, cond | {"guidance": torch.ones(2)})
    if name == "sd3":
        with pytest.raises(ValueError, match="13x4 patches are more than pos_embed_max_size 12"):
            net(torch.randn(2, 4, 26, 8), t, cond)


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (presets.SD3_TINY, {"caption_projection_dim": 30}, "caption_projection_dim 30 must be"),
        (presets.SD3_TINY, {"qk_norm": "layer_norm"}, "qk_norm 'layer_norm' is not one of"),
        (presets.SD3_TINY, {"dual_attention_layers": (3,)}, "dual_attention_layers 3: there are layers 0 to 2"),
        (presets.SD3_TINY, {"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
        (presets.FLUX_TINY, {"patch_size": 2}, "patch_size 2 is not supported"),
        (presets.FLUX_TINY, {"in_channels": 6}, "in_channels 6 must be a multiple of 4"),
        (presets.FLUX_TINY, {"axes_dims_rope": (4, 4, 4)}, "add up to 16"),
        (presets.PIXART_TINY, {"norm_type": "ada_norm"}, "norm_type 'ada_norm' is not supported"),
        (presets.PIXART_TINY, {"cross_attention_dim": 20}, "cross_attention_dim 20 must be"),
        (presets.PIXART_TINY, {"interpolation_scale": 0}, "interpolation_scale must be above 0"),
    ],
)
def test_configs_that_cannot_be(config: Any, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(config, **change)


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_compiles_as_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole, and the traced graph gives the same bits; the backend runs it as it is, by PyTorch's products."""
    monkeypatch.setattr(onednn, "wins", lambda: False)
    net = network(name)
    x, t, cond = inputs(name)
    traced = torch.compile(net, backend="eager", fullgraph=True)
    for given in (cond, net.prepared(cond)):
        assert torch.equal(traced(x, t, given), net(x, t, cond))
