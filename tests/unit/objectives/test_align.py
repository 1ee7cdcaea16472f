"""Representation alignment: its similarity against float64 arithmetic, what it adds to the loss, and what ends it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.models.network import Network, Tap, tapped
from ldm.models.networks import build as build_network
from ldm.models.transformers import presets
from ldm.models.unet import UNet
from ldm.objectives.align import Alignment, AlignOptions, chosen_place, without_projector
from ldm.objectives.denoise import DenoiseObjective
from ldm.rng import Rng
from ldm.types import Batch
from tests.distributed import tiny

OPTIONS = AlignOptions(weight=0.7, hidden=9, layer="mid_block", until=3)


def aligned(options: AlignOptions = OPTIONS, channels: int = 5, **more: Any) -> DenoiseObjective:
    """The tiny objective with a projector of random weights."""
    plain = tiny.build()
    return with_alignment(plain, options, channels, **more)


def with_alignment(plain: DenoiseObjective, options: AlignOptions, channels: int = 5, **more: Any) -> DenoiseObjective:
    network = plain.trained
    assert isinstance(network, Network)
    torch.manual_seed(7)
    alignment = Alignment(network, options, channels, **more)
    feed: Any = plain._feed
    told = replace(plain.options, align=options)
    return DenoiseObjective(network, plain.process, feed._codec, tiny.encode_text, told, alignment=alignment)


def batch_of(grid: tuple[int, int] = (2, 2), channels: int = 5) -> tuple[Batch, Rng]:
    batch = tiny.rows(0, [0, 1, 2])
    batch["weight"] = torch.tensor([1.0, 0.5, 2.0])
    batch["features"] = Rng.of(4, batch["position"]).normal("features", (channels, *grid))
    return batch, Rng.of(tiny.SEED, batch["position"])


def seen_by_a_hook(objective: DenoiseObjective, batch: Batch, rng: Rng) -> Tensor:
    """The middle's output, by torch's own hook."""
    kept: list[Tensor] = []
    network: Any = objective.trained
    handle = network.mid_block.register_forward_hook(lambda module, args, out: kept.append(out))
    objective(batch, rng)
    handle.remove()
    return kept[0].detach()


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def test_the_loss_is_that_of_the_paper_in_float64() -> None:
    """Denoising's loss + weight x the mean of 1 - cos(h_phi(h_t), y) over places (eq. 8), each sample by its weight."""
    plain, objective, (batch, rng) = tiny.build(), aligned(), batch_of()
    before, _ = plain(batch, rng)
    loss, metrics = objective(batch, rng)
    rows = seen_by_a_hook(objective, batch, rng).double().numpy().transpose(0, 2, 3, 1).reshape(3, 4, -1)
    layers = [m for m in objective.alignment.projector if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
    for i, layer in enumerate(layers):
        rows = rows @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        rows = silu(rows) if i < 2 else rows
    wanted = batch["features"].double().numpy().transpose(0, 2, 3, 1).reshape(3, 4, -1)
    cosine = (rows * wanted).sum(-1) / np.linalg.norm(rows, axis=-1) / np.linalg.norm(wanted, axis=-1)
    each = cosine.mean(1)
    assert float(metrics["alignment"]) == pytest.approx(each.mean(), rel=1e-5)
    expected = before.item() + 0.7 * ((1 - each) * np.array([1.0, 0.5, 2.0])).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_features_of_another_grid_are_resized() -> None:
    """Means of 2 x 2 equal features are those features; the similarity is that of the small grid."""
    objective, (batch, rng) = aligned(), batch_of()
    _, small = objective(batch, rng)
    batch["features"] = batch["features"].repeat_interleave(4, 2).repeat_interleave(4, 3)
    _, large = objective(batch, rng)
    # antialiased bilinear weights reach beyond a square of 4: not equal, but of the same picture
    assert abs(float(small["alignment"]) - float(large["alignment"])) < 0.1
    ones = torch.ones(3, 5, 6, 6)
    _, flat = objective({**batch, "features": ones}, rng)
    _, same = objective({**batch, "features": ones[..., :2, :2]}, rng)
    assert float(flat["alignment"]) == pytest.approx(float(same["alignment"]), abs=1e-6)


def gradients(objective: DenoiseObjective, batch: Batch, rng: Rng) -> dict[str, Tensor]:
    objective.zero_grad()
    objective(batch, rng)[0].backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def test_from_until_on_the_network_learns_as_without_it_bit_for_bit() -> None:
    plain, objective, (batch, rng) = tiny.build(), aligned(), batch_of()
    bare = gradients(plain, batch, rng)
    objective.after_step(2)
    on = gradients(objective, batch, rng)
    assert any(not torch.equal(on[name], bare[name]) for name in bare)
    assert any(float(on[name].abs().max()) > 0 for name in on if name.startswith("alignment."))
    objective.after_step(3)
    network: Any = objective.trained
    assert network.tap is None
    calls: list[int] = []
    assert objective.alignment is not None
    objective.alignment.projector.register_forward_hook(lambda m, args, out: calls.append(args[0].numel()))
    off = gradients(objective, batch, rng)
    assert calls == [12]  # one row: every stage of ZeRO wants a gradient of every weight
    assert all(torch.equal(off[name], bare[name]) for name in bare)
    assert all(not off[name].any() for name in off if name.startswith("alignment."))
    assert set(off) == set(on)
    assert objective(batch, rng)[0].item() == plain(batch, rng)[0].item()


def test_held_out_losses_are_those_of_denoising_alone() -> None:
    plain, objective, (batch, rng) = tiny.build(), aligned(), batch_of()
    with torch.no_grad():
        loss, metrics = objective(batch, rng)
        assert float(loss) == float(plain(batch, rng)[0])
    assert "alignment" not in metrics


def test_pictures_are_encoded_where_nothing_is_cached() -> None:
    seen: list[Tensor] = []

    def encode(images: Tensor) -> Tensor:
        seen.append(images)
        return features

    objective, (batch, rng) = aligned(encode=encode), batch_of()
    features = batch["features"]
    _, cached = objective(batch, rng)
    assert not seen
    pictures = {k: v for k, v in batch.items() if k != "features"} | {"image": torch.zeros(3, 3, 4, 4)}
    _, online = objective(pictures, rng)
    assert float(online["alignment"]) == float(cached["alignment"])
    assert len(seen) == 1
    with pytest.raises(ValueError, match=r"options.align: the batch has neither pictures nor cached features"):
        aligned()(pictures, rng)


NETS = {
    "sd3": presets.SD3_TINY, "flux": replace(presets.FLUX_TINY, guidance_embeds=False), "pixart": presets.PIXART_TINY,
    "zimage": presets.ZIMAGE_TINY,
}  # fmt: skip
BLOCKS = {"zimage": "layers"}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_every_transformer_shows_the_picture_s_tokens_of_each_block(kind: str, recompute: bool) -> None:
    """Those that torch's hook sees after the block; of text and picture in one row, the picture's."""
    torch.manual_seed(3)
    network = build_network(NETS[kind]).train()
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    network.enable_gradient_checkpointing(recompute)
    x, t = torch.randn(2, 4, 8, 4), torch.tensor([3.0, 700.0])
    cond = {"text": torch.randn(2, 5, 20), "pooled": torch.randn(2, 12)}
    names = [name for name, _ in network.blocks()][-network.depth:]  # fmt: skip
    assert list(network.places()) == [str(i) for i in range(len(names))]
    for place, name in zip(network.places(), names, strict=True):
        kept: list[Any] = []
        handle = network.get_submodule(name).register_forward_hook(lambda m, args, out, to=kept: to.append(out))
        with tapped(network, place) as tap:
            network(x, t, cond)
        handle.remove()
        out = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        own = out[:, :8] if kind == "zimage" else out[:, -8:]  # 4 x 2 patches, first or last in the row
        assert tap.value is not None
        assert tap.value.shape == (2, 8, network.places()[place])
        assert torch.equal(tap.value, own)
        assert network.tap is None
        gradient = torch.autograd.grad(tap.value.square().sum(), next(iter(network.get_submodule(name).parameters())))
        assert gradient[0].isfinite().all()


def test_the_u_net_shows_each_resolution_before_it_is_resampled() -> None:
    unet = tiny.build().trained
    assert isinstance(unet, UNet)
    x, t, cond = torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), tiny.encode_text(["a", "b"])
    sides = {"down_blocks.0": 4, "down_blocks.1": 2, "mid_block": 2, "up_blocks.0": 2, "up_blocks.1": 4}
    assert list(unet.places()) == list(sides)
    for place, width in unet.places().items():
        with tapped(unet, place) as tap:
            out = unet(x, t, cond)
        assert tap.value is not None
        assert tap.value.shape == (2, width, sides[place], sides[place])
        assert torch.equal(out, unet(x, t, cond))
    with tapped(unet, "mid_block") as tap:
        unet(x, t, cond)
    assert torch.equal(tap.value, unet.middle(x, t, cond))  # type: ignore[arg-type]


def test_layers_that_there_are_not_are_named() -> None:
    unet = tiny.build().trained
    assert isinstance(unet, Network)
    assert chosen_place(unet, None) == ("mid_block", 12)
    with pytest.raises(ValueError, match=r"layer: 3 is not a layer of the U-Net; allowed: \['down_blocks.0', "):
        chosen_place(unet, 3)
    sd3 = build_network(presets.SD3_TINY)
    assert chosen_place(sd3, None) == ("0", 32)
    with pytest.raises(ValueError, match="'mid_block' is not a layer of the SD3 transformer"):
        chosen_place(sd3, "mid_block")


def test_a_layer_that_sees_a_part_of_the_tokens_is_refused() -> None:
    """Of 4 x 2 tokens 5 stay inside of a span that the others are led around."""
    alignment = Alignment(build_network(presets.SD3_TINY), AlignOptions(hidden=4, layer=1), 5)
    with pytest.raises(ValueError, match=r"options.align.layer: block 1 sees only the tokens that are not led around"):
        alignment(Tap("1", torch.zeros(2, 5, 32)), {"features": torch.zeros(2, 5, 4, 2)}, (8, 4))


def test_options_are_checked_and_adapters_refused() -> None:
    wrong: dict[str, Any]
    for wrong in ({"weight": 0.0}, {"hidden": 0}, {"until": 0}, {"size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AlignOptions(**wrong)
    with pytest.raises(ValueError, match=r"options.align: is for a network that trains as a whole \(text_to_image\)"):
        tiny.build(align=OPTIONS)


def test_the_projector_is_in_checkpoints_and_not_in_what_is_exported() -> None:
    objective = aligned()
    names = {n.removeprefix("trained.") for n, _ in objective.named_parameters()}
    assert {f"alignment.projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")} < names
    kept = without_projector(dict.fromkeys(names, torch.zeros(1)))
    assert set(kept) == {n for n, _ in objective.trained.named_parameters()}
