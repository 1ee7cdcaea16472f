"""ControlNet's own: equal rows are computed once, recomputing changes nothing, other factors of autoencoders."""

from __future__ import annotations

import pytest
import torch

from ldm.models.unet import ControlNet, ControlNetConfig, UNet, UNetConfig

torch.set_num_threads(1)
UNET = UNetConfig(
    block_out_channels=(16, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=8, attention_head_dim=2, cross_attention_dim=12,
    layers_per_block=1,
)  # fmt: skip


def made(factor: int = 8) -> tuple[UNet, ControlNet]:
    torch.manual_seed(0)
    unet = UNet(UNET)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    control = ControlNet.copy_of(unet, factor)
    for parameter in control.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return unet, control


@torch.no_grad()
def test_equal_rows_are_computed_once_and_give_the_same() -> None:
    """What guidance asks: two times the same rows under other texts."""
    unet, control = made(4)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randn(4, 7, 12)
    picture = torch.rand(2, 3, 32, 32)
    cond = {"text": text, "condition": torch.cat([picture] * 2)}
    both, times = torch.cat([x, x]), torch.cat([t, t])
    wanted = unet(both, times, cond, control(both, times, cond, 0.5))
    told = cond | {"copies": x.new_empty(2, 0)}
    added = control(both, times, told, 0.5)
    assert len(added.down[0]) == 2  # before the first text
    assert len(added.mid) == 4
    assert torch.allclose(unet(both, times, told, added), wanted, atol=1e-5)
    prepared = unet.prepared({"text": text}) | {"copies": x.new_empty(2, 0)}
    assert torch.allclose(unet(both, times, prepared, added), wanted, atol=1e-5)


def test_two_add_up_and_recomputing_changes_nothing() -> None:
    unet, control = made()
    unet.requires_grad_(False)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    cond = {"text": torch.randn(1, 7, 12), "condition": torch.rand(1, 3, 64, 64)}
    one, more = control(x, t, cond, 0.25), control(x, t, cond, 0.5)
    assert torch.allclose(one.plus(more).mid, control(x, t, cond, 0.75).mid, atol=1e-6)
    grads = []
    for how in ("none", "block", "transformer"):
        control.zero_grad()
        for network in (unet, control):
            network.enable_gradient_checkpointing(how)
        unet(x, t, cond, control(x, t, cond)).square().mean().backward()
        grads.append([p.grad.clone() for p in control.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(control.parameters()))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))


@pytest.mark.parametrize(("factor", "widths"), [(1, (16,)), (4, (16, 32, 96)), (16, (16, 32, 96, 256, 256))])
def test_the_condition_has_as_many_pixels_as_the_picture(factor: int, widths: tuple[int, ...]) -> None:
    control = ControlNet(ControlNetConfig.of(UNET, factor, 1))
    assert control.config.conditioning_embedding_out_channels == widths
    assert control.config.factor == factor
    cond = {"text": torch.randn(1, 7, 12), "condition": torch.rand(1, 1, 4 * factor, 6 * factor)}
    assert control(torch.randn(1, 4, 4, 6), torch.tensor([1]), cond).down[0].shape == (1, 16, 4, 6)
    with pytest.raises(ValueError, match=f"expected {8 * factor} x {8 * factor}"):
        control(torch.randn(1, 4, 8, 8), torch.tensor([1]), cond)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"latents of 1/2, 1/4, 1/8, \.\.\. of the pictures' side, got 1/3"):
        ControlNetConfig.of(UNET, 3)
    with pytest.raises(ValueError, match="controlnet_conditioning_channel_order 'gbr' is not one of"):
        ControlNetConfig(controlnet_conditioning_channel_order="gbr")
