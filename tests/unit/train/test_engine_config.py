"""DeepSpeed's configuration: every key that we write is one that it knows and takes; bad values are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from ldm.train import zeropp
from ldm.train.engine import _deepspeed, compile_blocks
from ldm.train.engine_config import EngineConfig, deepspeed_config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_key_of_zero_is_known_and_taken(stage: int) -> None:
    _deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    written = deepspeed_config(EngineConfig(zero_stage=stage, bucket=1234, live=77), 2, 3)["zero_optimization"]
    fields = DeepSpeedZeroConfig.model_fields
    names = {field.alias or name: name for name, field in fields.items()}
    assert set(written) <= set(names)
    taken = DeepSpeedZeroConfig(**written)
    for key, value in written.items():
        if not isinstance(value, dict):
            assert getattr(taken, names[key]) == value, key
    if stage == 3:
        assert (taken.max_live_parameters, taken.max_reuse_distance) == (77, 77)


def test_what_would_default_to_something_else_is_written() -> None:
    whole = deepspeed_config(EngineConfig(zero_stage=2, clip=0.0), 2, 3)
    assert whole["gradient_clipping"] == 0.0  # 1.0 without the key
    assert whole["zero_force_ds_cpu_optimizer"] is False  # which would compile C++
    assert whole["zero_optimization"]["round_robin_gradients"] is False
    assert (whole["train_micro_batch_size_per_gpu"], whole["gradient_accumulation_steps"]) == (2, 3)
    json.dumps(whole)  # as --print-config shows it


def test_the_loss_scale_of_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    written = deepspeed_config(EngineConfig(precision="fp16", loss_scale=128.0, loss_scale_power=9), 1, 1)["fp16"]
    assert (written["enabled"], written["loss_scale"], written["initial_scale_power"]) == (True, 128.0, 9)
    assert deepspeed_config(EngineConfig(precision="fp16"), 1, 1)["fp16"]["loss_scale"] == 0.0  # found by itself


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_on_one_process_nothing_is_divided(stage: int) -> None:
    assert EngineConfig(zero_stage=stage).effective(1) == EngineConfig(zero_stage=0)
    assert EngineConfig(zero_stage=stage).effective(2).zero_stage == stage
    assert EngineConfig(zero_stage=stage, offload_optimizer=True).effective(1).zero_stage == stage


def test_zeropp_is_written_and_is_off_where_it_has_nothing_to_do() -> None:
    config = EngineConfig(zero_stage=3, hpz_partition=8, quantized_weights=True, quantized_gradients=True)
    keys = ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients")
    for world, written in ((16, (8, True, True)), (8, (1, True, True)), (1, (1, False, False))):
        zero = deepspeed_config(config.effective(world), 2, 1)["zero_optimization"]
        assert tuple(zero[key] for key in keys) == written, world
        assert zero["zero_quantized_nontrainable_weights"] is False
    off = deepspeed_config(EngineConfig(zero_stage=3), 2, 1)["zero_optimization"]
    assert tuple(off[key] for key in keys) == (1, False, False)
    assert replace(config, offload_parameters=True).effective(1) == EngineConfig(zero_stage=3, offload_parameters=True)


@pytest.mark.parametrize(
    ("world", "node", "options", "said"),
    [
        (
            "8",
            "4",
            {"hpz_partition": 3},
            "train.engine.hpz_partition: 3 does not divide 8 processes; allowed are 1, 2, 4",
        ),
        ("5", "5", {"hpz_partition": 2}, "2 does not divide 5 processes; allowed are 1 .1 is off., and a node has 5"),
        ("2", "2", {"quantized_weights": True}, "train.engine.quantized_weights: DeepSpeed quantises on GPUs alone"),
        (
            "2",
            "2",
            {"quantized_gradients": True},
            "quantized_gradients: DeepSpeed quantises on GPUs alone; false is allowed",
        ),
        ("8", "4", {"hpz_partition": 4}, None),
        ("1", "1", {"hpz_partition": 4, "quantized_gradients": True}, None),
    ],
)
def test_what_of_zeropp_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, world: str, node: str, options: dict[str, Any], said: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", node)
    config = EngineConfig(zero_stage=3, **options)
    if said is None:
        zeropp.check(config)
        return
    with pytest.raises(ValueError, match=said):
        zeropp.check(config)


@pytest.mark.parametrize(
    ("node", "part", "said"),
    [
        ("4", 4, ""),
        ("4", 8, "hpz_partition: 8 is off, as 8 processes"),
        ("2", 4, "groups of 4 span nodes, which have 2"),
    ],
)
def test_where_hpz_does_little_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], node: str, part: int, said: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", node)
    zeropp.tell(EngineConfig(zero_stage=3, hpz_partition=part))
    told = capsys.readouterr().err
    assert said in told if said else not told


@pytest.mark.parametrize(
    ("numel", "world", "rows"),
    [(128 * 128, 4, 128), (10**6, 64, 0), (1 << 22, 16, 4096), (320 * 320 * 9, 16, 960), (320 * 320 * 9, 128, 1152)],
)
def test_groups_of_a_quantised_gradient(numel: int, world: int, rows: int) -> None:
    """As many as each rank gets of, no larger than their number, of whole loads of 8 values."""
    found = zeropp.rows(numel, world)
    assert found == rows
    if found:
        assert found % world == numel % found == 0
        assert numel // found % 8 == 0
        assert numel // found <= found


STARTS = """
import sys
import torch.utils.cpp_extension as extension

def refuse(*args, **kwargs):
    sys.exit("C++ is compiled")

extension.load = extension.load_inline = extension._jit_compile = refuse
import torch
from ldm.objectives import Objective
from ldm.train.engine import Engine
from ldm.train.engine_config import EngineConfig
from ldm.train.optim import Optim

class Square(Objective):
    def forward(self, batch, rng):
        return self.trained(batch["x"]).square().mean(), {}

for offload in (False, True):
    objective = Square(torch.nn.Linear(4, 4))
    config = EngineConfig(zero_stage=2, precision="fp32", offload_optimizer=offload)
    engine = Engine(objective, Optim().build(objective.parameters()), config, micro_batch=2, accumulate=1)
    loss, _ = engine.forward({"x": torch.ones(2, 4)}, None)
    assert engine.backward_step(loss)
print("stepped")
"""


def test_nothing_is_compiled_at_the_start() -> None:
    """In a process of its own, where whoever compiles C++ ends it; offloading included."""
    env = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", STARTS], capture_output=True, text=True, env=env, timeout=300)
    assert done.stdout.strip().endswith("stepped"), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"offload_parameters": True}, "offload_parameters: needs zero_stage 3, got 1"),
        ({"offload_optimizer": True, "zero_stage": 0}, "offload_optimizer: needs zero_stage 1, 2 or 3"),
        ({"live": -1}, "live must be at least 0"),
        ({"bucket": 0}, "bucket must be at least 1"),
        ({"hpz_partition": 0, "zero_stage": 3}, "hpz_partition must be at least 1 rank .1 is off., got 0"),
        ({"hpz_partition": 8}, "hpz_partition: needs zero_stage 3, got 1"),
        ({"quantized_weights": True, "zero_stage": 2}, "quantized_weights: needs zero_stage 3, got 2"),
        ({"quantized_gradients": True, "zero_stage": 0}, "quantized_gradients: needs zero_stage 3, got 0"),
        ({"loss_scale": -1.0}, "loss_scale must be at least 0"),
        ({"loss_scale_power": 64}, "loss_scale_power must be in"),
    ],
)
def test_bad_values_are_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EngineConfig(**options)


def test_compiling_by_block_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="compile: 'blocks' needs zero_stage 0, 1 or 2, got 3"):
        EngineConfig(compile="blocks", zero_stage=3)
    with pytest.raises(ValueError, match="compile: 'blocks' is for denoising networks, and Linear trains"):
        compile_blocks(torch.nn.Linear(2, 2))
