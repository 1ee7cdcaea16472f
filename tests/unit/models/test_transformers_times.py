"""Modulations of all steps at once: the plain path's numbers, where they do not apply, bounded, nothing left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.models.presets import UNETS
from ldm.models.transformers import presets
from ldm.models.transformers.blocks import Modulation
from ldm.models.transformers.flux import FluxTransformer
from ldm.models.transformers.pixart import PixArtTransformer
from ldm.models.transformers.sd3 import SD3Transformer
from ldm.models.transformers.times import known_times
from ldm.models.unet import UNet

TIMES = [1000.0, 700.1, 333.333333, 12.5]
NETS: dict[str, Any] = {
    "sd3": lambda: SD3Transformer(presets.SD3_TINY),
    "flux": lambda: FluxTransformer(replace(presets.FLUX_TINY, guidance_embeds=False)),
}


def network(name: str) -> Any:
    torch.manual_seed(0)
    net = NETS[name]()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net


def inputs(rows: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    """Half of the rows are the same, as in guidance."""
    torch.manual_seed(1)
    pooled = torch.cat([torch.randn(1, 12).expand(rows // 2, -1), torch.randn(rows - rows // 2, 12)])
    return torch.randn(rows, 4, 8, 6), {"text": torch.randn(rows, 5, 20), "pooled": pooled}


def at(time: float, rows: int = 4) -> Tensor:
    return torch.full((rows,), time, dtype=torch.float32)


def rows_of(net: Any) -> list[int]:
    """Fills with how many rows the first modulation's weights are applied to, a call at a time."""
    found: list[int] = []
    first = next(m for m in net.modules() if isinstance(m, Modulation))
    first.linear.register_forward_hook(lambda _, args, out: found.append(len(args[0])))
    return found


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_the_plain_paths_numbers_from_one_product(name: str) -> None:
    net = network(name).double()
    x, cond = inputs()
    x, cond = x.double(), net.prepared({k: v.double() for k, v in cond.items()})
    plain = [net(x, at(t), cond) for t in TIMES]
    found = rows_of(net)
    with known_times(net, TIMES):
        known = [net(x, at(t), cond) for t in TIMES]
        one = net(x, at(TIMES[1])[:1], cond)
        fewer = net(x[:2], at(TIMES[2], 2), {k: v[:2] for k, v in cond.items()})
    assert found == [3 * len(TIMES)], "3 of the 4 rows differ"
    assert max(far(a, b) for a, b in zip(known, plain, strict=True)) < 1e-13
    assert far(one, plain[1]) < 1e-13
    assert far(fewer, plain[2][:2]) < 1e-13
    assert far(plain[0], plain[1]) > 1e-3, "the time does not matter: nothing was tested"
    assert net.known_times is None
    assert torch.equal(net(x, at(TIMES[0]), cond), plain[0])


@pytest.mark.parametrize("half", [False, True])
@torch.no_grad()
def test_in_float32_and_under_autocast(half: bool) -> None:
    net = network("sd3")
    x, cond = inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        cond = net.prepared(cond)
        plain = [net(x, at(t), cond) for t in TIMES]
        with known_times(net, TIMES):
            known = [net(x, at(t), cond) for t in TIMES]
    assert max(far(a, b) for a, b in zip(known, plain, strict=True)) < (0.01 if half else 1e-6)
    assert known[0].dtype == plain[0].dtype


@torch.no_grad()
def test_the_plain_path_where_it_does_not_apply() -> None:
    net = network("sd3")
    x, cond = inputs()
    cond = net.prepared(cond)
    mixed = torch.tensor([TIMES[0], TIMES[1], TIMES[1], TIMES[0]])
    wanted = {"other": net(x, at(500.0), cond), "mixed": net(x, mixed, cond)}
    found = rows_of(net)
    with known_times(net, TIMES):
        assert torch.equal(net(x, at(500.0), cond), wanted["other"])
        assert torch.equal(net(x, mixed, cond), wanted["mixed"])
        assert found == [4, 4]
        with torch.enable_grad():
            net(x, at(TIMES[0]), cond).sum().backward()
        assert found == [4, 4, 4]
        assert net.norm_out.linear.weight.grad.norm() > 0
        bad = net(x, at(TIMES[0]), cond | {"vector": cond["vector"] * torch.nan})
        assert bad.isnan().all()
        traced = torch.compile(net, backend="eager", fullgraph=True)
        found.clear()
        plain = traced(x, at(TIMES[0]), cond)
        assert found == [4]
        assert far(net(x, at(TIMES[0]), cond), plain) < 1e-6
    with known_times(net, TIMES), pytest.raises(KeyError):
        raise KeyError
    assert net.known_times is None


@torch.no_grad()
def test_it_keeps_to_its_room() -> None:
    net = network("sd3")
    x, cond = inputs()
    cond = net.prepared(cond)
    plain = [net(x, at(t), cond) for t in TIMES]
    step = 3 * 4 * sum(m.linear.out_features for m in net.modules() if isinstance(m, Modulation))
    for limit, rows in ((4 * step, [12]), (3 * step, [9, 4]), (2 * step, [6, 6]), (2 * step - 1, [4] * 4)):
        found = rows_of(net)
        with known_times(net, TIMES, limit=limit):
            known = [net(x, at(t), cond) for t in TIMES]
            assert sum(t.nbytes for t in net.known_times._tables) <= limit
        assert found == rows
        assert max(far(a, b) for a, b in zip(known, plain, strict=True)) < 1e-6


@torch.no_grad()
def test_rows_that_come_later_join_those_that_are_there() -> None:
    """Skip-layer guidance asks for some of the rows again; two prompts that take turns are both kept."""
    net = network("sd3")
    x, cond = inputs()
    cond = net.prepared(cond)
    parts = [{k: v[rows] for k, v in cond.items()} for rows in ([0, 1], [2, 3])]
    wanted = net.without([1])(x[2:], at(TIMES[1], 2), parts[1])
    found = rows_of(net)
    with known_times(net, TIMES):
        for t in TIMES:
            for i in (0, 1):
                net(x[:2], at(t, 2), parts[i])
        skipped = net.without([1])(x[2:], at(TIMES[1], 2), parts[1])
    assert found == [4, 12]
    assert far(skipped, wanted) < 1e-6


@torch.no_grad()
def test_networks_without_such_modulations_are_left_alone() -> None:
    for net in (PixArtTransformer(presets.PIXART_TINY), UNet(UNETS["tiny"])):
        before = dict(vars(net))
        with known_times(net, TIMES):
            assert getattr(net, "known_times", None) is None
        assert vars(net).keys() - {"known_times"} == before.keys() - {"known_times"}
