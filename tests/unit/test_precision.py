"""What `precision: auto` chooses: the faster of two, once a process, alike on all ranks, kept by a run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm import dist, precision
from ldm.cli.data import _moments
from ldm.config.load import dump
from ldm.models import onednn, wide
from ldm.models.presets import AUTOENCODERS
from ldm.models.vae.autoencoder import Autoencoder
from ldm.models.vae.latents import LatentCodec
from ldm.models.wide import quickened
from ldm.precision import Measured
from ldm.recipes.run import settled
from ldm.train.engine_config import EngineConfig
from ldm.train.trainer import TrainConfig
from tests import ranks


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has asked for nothing yet."""
    monkeypatch.delenv(precision.VARIABLE)
    monkeypatch.setattr(precision, "_found", {})
    monkeypatch.setattr(precision, "_measured", None)
    return


def finds(monkeypatch: pytest.MonkeyPatch, fp32: float, bf16: float) -> list[int]:
    """The measurement replaced by two figures; the list grows by each call."""
    calls: list[int] = []

    def measure() -> Measured:
        calls.append(1)
        return Measured(fp32=fp32, bf16=bf16)

    monkeypatch.setattr(precision, "measure", measure)
    return calls


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"), [(214.0, 133.0, "bf16"), (133.0, 214.0, "fp32"), (100.0, 99.0, "fp32")]
)
def test_auto_is_the_faster_and_both_figures_are_told_once(
    fp32: float, bf16: float, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gain within the noise is none."""
    calls = finds(monkeypatch, fp32, bf16)
    assert [precision.chosen("auto", "cpu") for _ in range(3)] == [expected] * 3
    assert EngineConfig(precision="auto").dtype() == precision.DTYPES[expected]
    assert calls == [1]
    said = capsys.readouterr().err
    assert said.count("precision auto") == 1
    assert all(f in said for f in (expected, f"{fp32:.2f} ms in fp32", f"{bf16:.2f} ms in bf16"))


def test_what_is_asked_for_is_never_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = finds(monkeypatch, 2, 1)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert {name: precision.compute_dtype(name) for name in wanted} == wanted
    monkeypatch.setenv(precision.VARIABLE, "bf16")
    assert precision.chosen("auto", "cpu") == "bf16"
    assert not calls
    monkeypatch.setenv(precision.VARIABLE, "half")
    with pytest.raises(ValueError, match=r"LDM_AUTO_PRECISION: 'half' is not one of \['fp32', 'bf16'\]"):
        precision.chosen("auto", "cpu")
    with pytest.raises(ValueError, match="precision: 'half' is not one of"):
        precision.chosen("half")


def test_the_measurement_is_short_and_leaves_no_trace() -> None:
    """Neither the generator nor torch's modes are touched; the clock decides which is faster."""
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with torch.no_grad():
        found = precision.measure()
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.is_autocast_enabled("cpu")
    assert found.fp32 > 0
    assert found.bf16 > 0


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_measured_is_the_product_that_networks_take(
    dtype: torch.dtype, amd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's matrix products, by operator, are those of a network's linear layer, forward and backward: oneDNN's in
    float32 on AMD's processors, PyTorch's on others.
    """
    if not onednn.available():
        pytest.skip("needs a PyTorch with oneDNN")
    monkeypatch.setattr(onednn, "wins", lambda: amd)
    monkeypatch.setattr(wide, "emulates", lambda dtype: False)
    with Products() as found:
        precision._work(dtype)()
    layer = nn.Linear(precision._CHANNELS, 4 * precision._CHANNELS, bias=False)
    x = torch.ones(precision._BATCH, precision._SIDE**2, precision._CHANNELS, requires_grad=True)
    with Products() as expected, torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        quickened(layer)(x).float().square().mean().backward()
    assert found.names == expected.names
    assert ("_linear_pointwise" in found.names) == (amd and dtype == torch.float32)


class Products(TorchDispatchMode):
    """How often each operator of matrix products is called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        self.names.update([name] if name in ("mm", "addmm", "bmm", "_linear_pointwise") else [])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("slow", range(3, 15))
def test_a_disturbed_step_does_not_decide(slow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of alternating rounds: a step during which something else ran is left out."""
    now, steps = 0.0, 0

    def work(dtype: torch.dtype) -> Callable[[], None]:
        def step() -> None:
            nonlocal now, steps
            steps += 1
            now += 0.05 if steps == slow else 0.002 if dtype == torch.float32 else 0.001

        return step

    monkeypatch.setattr(precision, "_work", work)
    found = precision.measure(lambda: now)
    assert (found.fp32, found.bf16) == pytest.approx((2, 1))


def on_rank() -> tuple[str, bool]:
    """Rank 0 would take bf16, the others fp32."""
    os.environ.pop(precision.VARIABLE, None)  # that of the process from which ranks are forked
    precision._found.clear()
    fp32, bf16 = (2.0, 1.0) if dist.rank() == 0 else (1.0, 2.0)
    asked = []
    precision.measure = lambda: asked.append(1) or Measured(fp32=fp32, bf16=bf16)  # type: ignore[assignment,func-returns-value]
    found = precision.chosen("auto", "cpu")
    assert found == precision.chosen("auto", "cpu")
    return found, bool(asked)


def test_all_ranks_take_what_rank_0_found() -> None:
    assert ranks.run(on_rank, 2) == [("bf16", True), ("bf16", False)]


def train(kind: str) -> TrainConfig:
    return TrainConfig(steps=4, batch=2, engine=EngineConfig(precision=kind))  # type: ignore[arg-type]


def test_a_run_writes_what_auto_became_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the other is faster by then; a folder without checkpoints has begun nothing."""
    finds(monkeypatch, 2, 1)
    config = {"train": train("auto"), "out": str(tmp_path), "note": "1e-4"}
    now, text = settled(config["train"], dump(config), tmp_path)  # type: ignore[arg-type]
    assert now == replace(train("auto"), engine=EngineConfig(precision="bf16"))
    assert text == dump(config | {"train": now})
    assert OmegaConf.create(text).train.engine.precision == "bf16"
    (tmp_path / "config.yaml").write_text(text)
    finds(monkeypatch, 1, 2)
    monkeypatch.setattr(precision, "_found", {})
    assert settled(train("auto"), dump(config), tmp_path)[0].engine.precision == "fp32", "nothing began yet"
    (tmp_path / "checkpoints" / "step-2").mkdir(parents=True)
    assert settled(train("auto"), dump(config), tmp_path) == (now, text)
    explicit = dump(config | {"train": train("fp32")})
    assert settled(train("fp32"), explicit, tmp_path) == (train("fp32"), explicit), "what is asked for is taken"


def test_encoding_takes_the_same_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments in float32: those of the codec in fp32, and within bfloat16's rounding of them otherwise."""
    codec = LatentCodec.of(Autoencoder(AUTOENCODERS["tiny"]).eval())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    exact, here = codec.moments(images), torch.device("cpu")
    for fp32, bf16, kind in ((1.0, 2.0, "fp32"), (2.0, 1.0, "bf16")):
        finds(monkeypatch, fp32, bf16)
        monkeypatch.setattr(precision, "_found", {})
        moments, found = _moments(codec, "auto", here)
        given = moments(images)
        assert found == kind
        assert given.dtype == torch.float32
        assert torch.equal(given, exact) is (kind == "fp32")
        torch.testing.assert_close(given, exact, rtol=0.05, atol=0.05)
