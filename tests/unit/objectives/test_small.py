"""Small first: means of latents by hand, the switch, positions of means, and sizes that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ldm.models.network import of_averages
from ldm.models.networks import build as build_network
from ldm.models.transformers import presets
from ldm.models.transformers.positions import PatchEmbed, position_table, rotary_positions
from ldm.objectives.denoise import DenoiseObjective
from ldm.objectives.small import SmallOptions, check_small, shrunk, side_at
from ldm.rng import Rng
from tests.distributed import tiny

SMALL = SmallOptions(until=2, factor=2, scale=1.5)


def test_latents_are_means_and_told_sizes_shrink_with_them() -> None:
    latents = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[512.0, 640.0, 16.0, 4.0, 256.0, 256.0], [300.0, 300.0, 0.0, 8.0, 128.0, 256.0]])
    out, cond = shrunk(SMALL, latents, {"time_ids": ids, "text": torch.ones(2, 1)})
    values = latents.double().numpy()
    by_hand = np.zeros((2, 3, 3, 4))
    for i in range(2):
        for j in range(2):
            by_hand += values[:, :, i::2, j::2] / 4
    np.testing.assert_allclose(out.numpy(), 1.5 * by_hand, rtol=1e-5, atol=1e-6)
    assert cond["time_ids"].tolist() == [[512, 640, 8, 2, 128, 128], [300, 300, 0, 4, 64, 128]]
    assert cond["text"].shape == (2, 1)


def seen(objective: DenoiseObjective, step: int) -> tuple[Tensor, Tensor]:
    """What the network is given at a step, and the loss."""
    given: list[Tensor] = []
    handle = objective.trained.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    objective.after_step(step)
    batch = tiny.rows(0, [0, 1, 2])
    loss, _ = objective(batch, Rng.of(tiny.SEED, batch["position"]))
    handle.remove()
    return given[0], loss


def test_it_is_small_until_the_step_and_then_as_without_it() -> None:
    objective, plain = tiny.build(small=SMALL), tiny.build()
    assert [side_at(SMALL, step) for step in range(4)] == [2, 2, 1, 1]
    assert side_at(None, 0) == 1
    for step in (0, 1):
        x, _ = seen(objective, step)
        assert x.shape == (3, 4, 2, 2)
    x, loss = seen(objective, 2)
    whole, other = seen(plain, 2)
    assert torch.equal(x, whole)
    assert loss.item() == other.item()
    objective.after_step(0)
    with torch.no_grad():  # held-out losses are of whole pictures
        assert seen(objective, 0)[0].shape == (3, 4, 4, 4)


def test_noise_and_times_are_the_process_s_own_of_the_small_latents() -> None:
    """x_t = alpha scale mean(x_0) + sigma noise, with the sample's own keyed noise of that shape."""
    objective = tiny.build(small=SMALL)
    x, _ = seen(objective, 0)
    batch = tiny.rows(0, [0, 1, 2])
    rng = Rng.of(tiny.SEED, batch["position"])
    clean = objective.latents(batch, rng).double()
    means = 1.5 * clean.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))
    t = objective.process.times(rng.uniform("time"), 4)
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in objective.process.schedule.alpha_sigma(t, torch.float64))
    torch.testing.assert_close(x.double(), alpha * means + sigma * rng.normal("noise", (4, 2, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_tokens_of_means_have_the_mean_position(kept: bool) -> None:
    """Of SD3's stored table, from its centre, and of PixArt's that is computed."""
    torch.manual_seed(0)
    embed = PatchEmbed(4, 16, patch=2, base=4, max_size=10 if kept else None)
    nn.init.zeros_(embed.proj.bias)  # type: ignore[arg-type]
    whole = embed(torch.zeros(1, 4, 12, 8))[0].view(6, 4, 16)
    small = embed(torch.zeros(1, 4, 6, 4), 2)[0].view(3, 2, 16)
    by_hand = (whole[::2, ::2] + whole[1::2, ::2] + whole[::2, 1::2] + whole[1::2, 1::2]) / 4
    torch.testing.assert_close(small, by_hand)
    if not kept:
        table = position_table(6, 4, 16, base=4)
        assert torch.equal(whole.flatten(0, 1), table)


def test_rotary_positions_of_means_are_the_middles() -> None:
    cos, sin = rotary_positions(2, 3, 1, (4, 6, 6), torch.device("cpu"), torch.float64, 2)
    power = 10000.0 ** (-np.arange(0, 6, 2) / 6)
    for row in range(2):
        for column in range(3):
            angles = np.concatenate([np.zeros(2), (2 * row + 0.5) * power, (2 * column + 0.5) * power])
            place = 1 + 3 * row + column
            np.testing.assert_allclose(cos[place, 0], np.cos(angles), atol=1e-12)
            np.testing.assert_allclose(sin[place, 0], np.sin(angles), atol=1e-12)


def test_z_image_s_places_are_the_middles() -> None:
    network: Any = build_network(presets.ZIMAGE_TINY)
    lengths = torch.tensor([3])
    whole = network._image_places(lengths, 4, 4, 32)
    with of_averages(network, 2):
        small = network._image_places(lengths, 2, 2, 32)
        with pytest.raises(ValueError, match="34 rows of patches are more than axes_lens 32"):
            network._image_places(lengths, 17, 2, 64)
    by_hand = [[4, 0.5, 0.5], [4, 0.5, 2.5], [4, 2.5, 0.5], [4, 2.5, 2.5]]
    assert small[0, :4].tolist() == by_hand
    square = whole[0, :16].view(4, 4, 3).double()
    assert square[:2, 2:].mean((0, 1)).tolist() == by_hand[1]
    assert whole.dtype == torch.int64


NETS = {
    "sd3": presets.SD3_TINY, "flux": replace(presets.FLUX_TINY, guidance_embeds=False), "pixart": presets.PIXART_TINY,
    "zimage": presets.ZIMAGE_TINY,
}  # fmt: skip


@pytest.mark.parametrize("kind", NETS)
def test_every_transformer_is_told_and_forgets(kind: str) -> None:
    torch.manual_seed(3)
    network = build_network(NETS[kind])
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([3.0, 700.0])
    cond = {"text": torch.randn(2, 5, 20), "pooled": torch.randn(2, 12)}
    before = network(x, t, cond)
    with of_averages(network, 2):
        inside = network(x, t, cond)
    assert not torch.equal(inside, before)
    assert torch.equal(network(x, t, cond), before)


def test_what_cannot_be_small_is_refused() -> None:
    wrong: dict[str, Any]
    for wrong in ({"until": 0}, {"until": 1, "factor": 1}, {"until": 1, "scale": 0.0}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            SmallOptions(**wrong)
    check_small(SMALL, (8, 4), 2)
    with pytest.raises(ValueError, match="cannot be averaged over 2 x 2 pixels in patches of 2; sides must be mult"):
        check_small(SMALL, (8, 6), 2)
    with pytest.raises(ValueError, match="latents of 5 x 4 cannot be averaged over 2 x 2 pixels; sides"):
        shrunk(SMALL, torch.zeros(1, 4, 5, 4), {})
    micro = build_network(replace(presets.PIXART_TINY, use_additional_conditions=True))
    plain = tiny.build()
    feed: Any = plain._feed
    with pytest.raises(ValueError, match=r"options.small: this PixArt transformer is told the pictures' resolution"):
        DenoiseObjective(micro, plain.process, feed._codec, tiny.encode_text, replace(plain.options, small=SMALL))
