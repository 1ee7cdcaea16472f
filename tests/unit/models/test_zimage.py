"""Z-Image's transformer behind the seam: recomputing, skipping, first weights, half precision, errors, compiling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.models import families
from ldm.models.transformers import presets
from ldm.models.transformers.zimage import ZImageTransformer
from ldm.sampling.texts import padded


def network() -> ZImageTransformer:
    torch.manual_seed(0)
    net = ZImageTransformer(presets.ZIMAGE_TINY)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def inputs() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    mask = torch.arange(40) < torch.tensor([[7], [36]])
    return torch.randn(2, 4, 8, 6), torch.tensor([7.0, 801.0]), {"text": torch.randn(2, 40, 20), "mask": mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_prepared_rows_are_joined_and_chosen(dtype: torch.dtype) -> None:
    """As guidance does it: rows prepared by themselves, padded, and chosen again."""
    net = network().to(dtype)
    x, t, cond = inputs()
    assert torch.equal(net(x, t, net.prepared(cond)), net(x, t, cond))
    each = padded([net.prepared({k: v[i : i + 1] for k, v in cond.items()}) for i in range(2)])
    together = {k: torch.cat([c[k] for c in each]) for k in each[0]}
    assert together["mask"].sum(1).tolist() == [32, 64]
    near = 1e-5 if dtype == torch.float32 else 0.02
    assert (net(x, t, together) - net(x, t, cond)).norm() < near * net(x, t, cond).norm()


@torch.no_grad()
def test_a_text_without_tokens_is_padding_alone() -> None:
    net = network()
    x, t, cond = inputs()
    none = net(x, t, cond | {"mask": cond["mask"] & False})
    assert torch.equal(none, net(x, t, {"text": torch.randn(2, 40, 20), "mask": cond["mask"] & False}))
    assert none.isfinite().all()
    assert net.prepared(cond | {"mask": cond["mask"] & False})["context"].shape == (2, 32, 48)


def test_recomputing_gives_the_same_gradients() -> None:
    net = network().train()
    x, t, cond = inputs()
    ran: list[str] = []
    for prefix, block in net.blocks():
        block.register_forward_pre_hook(lambda *_, prefix=prefix: ran.append(prefix))
    grads = []
    for on in ("none", True):
        ran.clear()
        net.zero_grad()
        net.enable_gradient_checkpointing(on)  # type: ignore[arg-type]
        net(x, t, cond).square().sum().backward()
        grads.append({key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None})
        assert len(ran) == (2 if on is True else 1) * len(list(net.blocks()))
    assert grads[0].keys() == grads[1].keys() == dict(net.named_parameters()).keys()
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])


@torch.no_grad()
def test_skipping_counts_the_blocks_after_the_refiners() -> None:
    net = network()
    x, t, cond = inputs()
    whole, skipped = net(x, t, cond), net.without([1])(x, t, net.prepared(cond))
    assert not torch.equal(whole, skipped)
    net.layers[1].forward = lambda x, *_: x
    assert torch.equal(net(x, t, cond), skipped)
    with pytest.raises(ValueError, match="block 3 cannot be skipped: there are blocks 0 to 2"):
        net.without([3])


@torch.no_grad()
def test_a_fresh_network_gives_zeros_and_its_gated_blocks_the_identity() -> None:
    torch.manual_seed(0)
    net = ZImageTransformer(presets.ZIMAGE_TINY)
    x, t, cond = inputs()
    assert not net(x, t, cond).any()
    nn.init.normal_(net.all_final_layer["2-1"].get_submodule("linear").weight)  # type: ignore[arg-type]
    assert net(x, t, cond).any()
    assert torch.equal(net(x, t, cond), net.without(range(3))(x, t, cond))


@torch.no_grad()
def test_half_precision_is_near() -> None:
    """Bounds are a few of bfloat16's roundings (2^-9)."""
    net = network()
    x, t, cond = inputs()
    wanted = net(x, t, cond)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(x, t, cond)
    assert (mixed.float() - wanted).norm() < 0.03 * wanted.norm()
    half = net.bfloat16()(x, t, cond)
    assert half.dtype == torch.bfloat16
    assert (half.float() - wanted).norm() < 0.03 * wanted.norm()


@torch.no_grad()
def test_compiles_as_one_graph() -> None:
    """Where the text's length is not asked for; its mask leaves out what was cut off before."""
    net = network()
    net.layers, net.noise_refiner = net.layers[:1], nn.ModuleList()
    x, t, cond = inputs()
    traced = torch.compile(net, backend="eager", fullgraph=True)
    assert (traced(x, t, cond) - net(x, t, cond)).norm() < 1e-6 * net(x, t, cond).norm()


def test_groups_of_layers() -> None:
    groups = {name: group for name, _, group in network().correctable()}
    assert {g for n, g in groups.items() if ".attention." in n} == {"attention"}
    assert {g for n, g in groups.items() if ".feed_forward." in n} == {"feed_forward"}
    assert {g for n, g in groups.items() if "adaLN" in n or n.startswith("t_embedder")} == {"time"}
    assert (
        groups["cap_embedder.1"] == groups["all_x_embedder.2-1"] == groups["all_final_layer.2-1.linear"] == "projection"
    )


def test_mistakes_are_named() -> None:
    net = network()
    x, t, cond = inputs()
    with pytest.raises(ValueError, match="takes 4 channels, got 3"):
        net(x[:, :3], t, cond)
    with pytest.raises(ValueError, match=r"multiples of 2, got \(7, 6\)"):
        net(x[:, :, :7], t, cond)
    with pytest.raises(ValueError, match=r"cond 'text' has 3 channels, \w+ takes 20"):
        net(x, t, cond | {"text": torch.randn(2, 40, 3)})
    with pytest.raises(ValueError, match="needs cond 'text'"):
        net(x, t, {"mask": cond["mask"]})
    with pytest.raises(ValueError, match="33 rows of patches are more than axes_lens 32"):
        net(torch.randn(2, 4, 66, 8), t, cond)
    with pytest.raises(ValueError, match="a text of 160 tokens and the picture are more than axes_lens 160"):
        net(x, t, {"text": torch.randn(2, 150, 20)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"all_f_patch_size": (2,)}, "all_f_patch_size"),
        ({"all_patch_size": (2, 4)}, "all_patch_size"),
        ({"n_kv_heads": 1}, "n_kv_heads 1 is not supported"),
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim 1152 is not supported"),
        ({"n_heads": 5, "n_kv_heads": 5}, "dim 48 must be a multiple of n_heads 5"),
        ({"axes_dims": (4, 4, 4)}, "add up to 16"),
        ({"axes_lens": (1, 1)}, "axes_lens"),
        ({"n_layers": 0}, "n_layers must be a whole number of at least 1, got 0"),
    ],
)
def test_configs_that_cannot_be(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(presets.ZIMAGE_TINY, **change)


def test_turbo_and_base_are_told_apart_by_their_schedulers() -> None:
    """The shifts of both published schedulers; 8 steps are the 8 calls of Turbo's example with 9."""
    base, turbo = (families.family_of(presets.ZIMAGE, {"shift": shift}) for shift in (6.0, 3.0))
    assert (base.steps, base.guidance, turbo.steps, turbo.guidance) == (50, 5.0, 8, 1.0)
    assert families.family_of(presets.ZIMAGE) == base
