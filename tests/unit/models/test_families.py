"""Which family a network and its scheduler's config tell, by the published schedulers of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ldm.models import families, presets
from ldm.models.transformers import presets as transformers

PUBLISHED = json.loads((Path(__file__).parents[2] / "parity" / "published.json").read_text(encoding="utf-8"))
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
DEV = FLOW | {"shift": 3.0, "use_dynamic_shifting": True}


def published(name: str) -> dict[str, Any]:
    return PUBLISHED[name]["scheduler/scheduler_config.json"]


@pytest.mark.parametrize(
    ("network", "scheduler", "family", "drawn"),
    [
        (transformers.FLUX_DEV, DEV, "flux", ("euler", 28, 3.5)),
        (transformers.FLUX_SCHNELL, FLOW | {"shift": 1.0, "use_dynamic_shifting": False}, "flux_schnell",
         ("euler", 4, 1.0)),
        (transformers.FLUX_SCHNELL, DEV, "flux_guided", ("euler", 28, 3.5)),
        (transformers.SD3_MEDIUM, FLOW | {"shift": 3.0}, "sd3", ("euler", 28, 7.0)),
        (transformers.SD35_LARGE, FLOW | {"shift": 3.0}, "sd3", ("euler", 28, 7.0)),
        (transformers.ZIMAGE, FLOW | {"shift": 3.0}, "zimage_turbo", ("euler", 8, 1.0)),
        (transformers.ZIMAGE, FLOW | {"shift": 6.0}, "zimage", ("euler", 50, 5.0)),
        (presets.UNETS["sd21_base"], published("stable-diffusion-2-1-base"), "sd2", ("dpmpp_2m", 25, 7.5)),
        (presets.UNETS["sd21_base"], published("like sd-turbo"), "sd2_turbo", ("euler", 4, 1.0)),
        (presets.UNETS["sdxl"], published("stable-diffusion-xl-base-1.0"), "sdxl", ("dpmpp_2m", 30, 5.0)),
        (presets.UNETS["sdxl"], published("like sdxl-turbo"), "sdxl_turbo", ("euler_ancestral", 4, 1.0)),
        (presets.UNETS["sd15"], published("stable-diffusion-v1-4"), "sd15", ("dpmpp_2m", 25, 7.5)),
    ],
)  # fmt: skip
def test_the_scheduler_tells_families_of_one_network_apart(
    network: Any, scheduler: dict[str, Any], family: str, drawn: tuple[str, int, float]
) -> None:
    found = families.family_of(network, scheduler)
    assert found is families.FAMILIES[family]
    assert (found.sampler, found.steps, found.guidance) == drawn
    assert families.family_of(network).rank == found.rank


def test_zero_snr_at_trailing_times_is_no_turbo() -> None:
    """As SD models of zero terminal SNR are published (Euler, trailing times)."""
    for key, value in (("prediction_type", "v_prediction"), ("rescale_betas_zero_snr", True)):
        told = published("like sd-turbo") | {key: value}
        assert families.family_of(presets.UNETS["sd21_base"], told) is families.SD2
