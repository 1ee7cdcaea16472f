"""What a fine-tuning of a few choices takes from its base's family, as the network and the scheduler tell it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldm.models import presets
from ldm.models.transformers import presets as transformers
from ldm.recipes import folder_runs
from tests.unit.models.test_families import DEV, FLOW, published


@pytest.mark.parametrize(
    ("network", "scheduler", "rank", "drawn"),
    [
        (transformers.FLUX_SCHNELL, FLOW | {"shift": 1.0}, 16, {"sampler": "euler", "steps": 4, "guidance": 1.0}),
        (transformers.FLUX_SCHNELL, DEV, 16, {"sampler": "euler", "steps": 28, "guidance": 3.5}),
        (transformers.ZIMAGE, FLOW | {"shift": 3.0}, 16, {"sampler": "euler", "steps": 8, "guidance": 1.0}),
        (presets.UNETS["sd21_base"], published("like sd-turbo"), 4, {"sampler": "euler", "steps": 4, "guidance": 1.0}),
        (presets.UNETS["sd15"], {}, 4, {"sampler": "dpmpp_2m", "steps": 25, "guidance": 7.5}),
    ],
)
def test_rank_and_samples_are_the_familys(
    network: Any, scheduler: dict[str, Any], rank: int, drawn: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_runs, "network_of", lambda base: network)
    monkeypatch.setattr(folder_runs, "scheduler_of", lambda base: scheduler)

    def task(base: str, **adapter: Any) -> dict[str, Any]:
        choices = folder_runs.Choices(
            method="lora", images=Path("pictures"), base=base, size=64, adapter={"kind": "lora", **adapter}
        )
        return folder_runs.lora(choices)["task"]

    told = task("model", rank=None)
    assert told["adapter"]["rank"] == rank
    assert told["samples"]["settings"] == drawn
    assert task("model", rank=3)["adapter"]["rank"] == 3
    assert task("emoji", rank=None)["adapter"]["rank"] == 4
