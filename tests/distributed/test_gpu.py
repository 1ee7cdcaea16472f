"""The engine on a GPU against plain PyTorch on the CPU, at each precision and compiled; attention kernels there."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.models.attention import attention, using
from ldm.rng import Rng
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig
from tests.distributed import tiny

STEPS = 3
pytestmark = pytest.mark.gpu


def story(config: dict[str, Any]) -> dict[str, Any]:
    """Losses of some steps, the weights after them and what computed, in a process of its own."""
    import os

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    objective = tiny.build()
    optimizer = tiny.OPTIM.build(objective.parameters())
    settings = EngineConfig(clip=tiny.CLIP, **config)
    objective.to("cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(objective, optimizer, settings, micro_batch=tiny.BATCH, accumulate=1)
    losses = []
    for step in range(STEPS):
        engine.set_lr(tiny.OPTIM.lr_at(step, tiny.STEPS))
        batch = tiny.rows(step, list(range(tiny.BATCH)))
        batch |= {k: v.to(engine.device) for k, v in batch.items() if isinstance(v, Tensor) and k != "position"}
        loss, _ = engine.forward(batch, Rng.of(tiny.SEED, batch["position"]))
        engine.backward_step(loss)
        losses.append(float(loss.detach()))
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    weights = {n: p.detach().float().cpu().numpy() for n, p in engine.whole()}
    return {"losses": losses, "weights": weights, "tf32": tf32, "device": engine.device.type}


@pytest.fixture(scope="module")
def oracle() -> tiny.Plain:
    return tiny.plain(STEPS)


def told(**config: Any) -> dict[str, Any]:
    pytest.importorskip("deepspeed")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(story, (config,))


@pytest.mark.parametrize(
    ("config", "loss", "weights"),
    [
        ({"precision": "fp32", "tf32": False}, 1e-4, 1e-3),
        ({"precision": "fp32", "tf32": True}, 5e-3, 3e-2),
        ({"precision": "bf16"}, 5e-2, 3e-2),
        ({"precision": "fp16", "zero_stage": 1, "loss_scale": 256.0}, 2e-2, 3e-2),
        ({"precision": "fp32", "tf32": False, "compile": "inductor"}, 1e-3, 3e-3),
        ({"precision": "bf16", "compile": "inductor"}, 5e-2, 3e-2),
    ],
    ids=["fp32", "tf32", "bf16", "fp16", "compiled fp32", "compiled bf16"],
)
def test_steps_are_those_of_the_cpu(oracle: tiny.Plain, config: dict[str, Any], loss: float, weights: float) -> None:
    found = told(**config)
    assert found["device"] == "cuda"
    assert found["tf32"] == (config.get("tf32", True),) * 2
    for ours, theirs in zip(found["losses"], oracle.losses, strict=True):
        assert abs(ours - theirs) < loss * abs(theirs)
    own = {n: torch.from_numpy(v) for n, v in found["weights"].items()}
    assert tiny.worst(own, oracle.weights[-1]) < weights


KERNELS = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize(("queries", "keys"), [(64, 77), (63, 5)])
def test_kernels_of_torch_agree_with_float64(kernel: SDPBackend, dtype: torch.dtype, queries: int, keys: int) -> None:
    """Values and gradients; a kernel that this GPU has not (flash before Ampere) is skipped."""
    g = torch.Generator().manual_seed(0)
    wide = [torch.randn(2, n, 4, 40, generator=g, dtype=torch.float64) for n in (queries, keys, keys)]
    weight = torch.randn(2, queries, 4, 40, generator=g, dtype=torch.float64)
    half = [x.to("cuda", dtype).requires_grad_() for x in wide]
    exact = [x.detach().double().cpu().requires_grad_() for x in half]
    with using("cuda", "sdpa"), sdpa_kernel(kernel):
        try:
            out = attention(*half)
        except RuntimeError as error:
            pytest.skip(f"{kernel.name} is not on this GPU: {str(error).splitlines()[0]}")
        (out.double() * weight.cuda()).sum().backward()
    with using("cpu", "reference"):
        wanted = attention(*exact)
    (wanted * weight).sum().backward()
    assert (out.double().cpu() - wanted).norm() < 0.01 * wanted.norm()
    for a, b in zip(half, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad.double().cpu() - b.grad).norm() < 0.02 * b.grad.norm()


def test_efficient_attention_takes_masks() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 4, 40, generator=g) for n in (63, 77, 77))
    mask = torch.rand(2, 1, 63, 77, generator=g) > 0.3
    with using("cpu", "reference"):
        wanted = attention(q.double(), k.double(), v.double(), mask)
    with using("cuda", "sdpa"):
        out = attention(*(x.cuda().half() for x in (q, k, v)), mask.cuda())
    assert (out.double().cpu() - wanted).abs().max() < 5e-3
