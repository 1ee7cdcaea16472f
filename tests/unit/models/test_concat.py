"""U-Nets come to take more channels: the same answer bit for bit at first, and what it is told has gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ldm.models.concat import Kind, config_of, kind_of, wide_config, widened
from ldm.models.presets import UNETS
from ldm.models.unet.unet import UNet


@pytest.mark.parametrize(("kind", "channels"), [("mask", 9), ("source", 8), ("small", 7)])
def test_a_widened_network_answers_as_before(kind: Kind, channels: int) -> None:
    torch.manual_seed(0)
    net = UNet(UNETS["tiny"]).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    config = wide_config(net.config, kind)
    wide = widened(net, config)
    assert wide.in_channels == channels
    assert kind_of(wide.config, wide.in_channels, 4, 8) == kind
    assert wide_config(config, kind) == config
    assert widened(wide, config) is wide
    assert config_of(net.config, wide.state_dict()) == config
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    cond = {"text": torch.randn(2, 7, net.config.per_level("cross_attention_dim")[0])}
    told = cond | {"concat": torch.randn(2, channels - 4, 8, 8), "class": torch.tensor([0, 999])}
    out = wide(x, t, told)
    with torch.no_grad():
        assert torch.equal(out, net(x, t, cond))
    out.square().sum().backward()
    assert wide.conv_in.weight.grad[:, 4:].abs().min() > 0  # type: ignore[index]


def test_kinds_by_their_channels() -> None:
    sd = UNETS["sd15"]
    assert kind_of(sd, 4, 4, 8) is None
    assert kind_of(UNETS["sd15_inpainting"], 9, 4, 8) == "mask"
    assert kind_of(replace(sd, in_channels=7), 7, 4, 8) is None  # no level is told
    assert kind_of(sd, 4 + 4 + 64, 4, 8) == "fill"
