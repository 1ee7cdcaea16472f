"""diffusers' example scripts: what each trains, and the defaults that it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["finetune", "dreambooth", "textual_inversion", "controlnet"]


@dataclass(frozen=True, kw_only=True)
class Script:
    """One script. `steps` 0: by epochs. `text_rate`: of text encoders where it is not that of all."""

    method: Method
    family: Literal["sd", "sdxl", "sd3", "flux"] = "sd"
    lora: bool = False
    out: str = "sd-model-finetuned"
    batch: int = 16
    epochs: int = 100
    steps: int = 0
    rate: float = 1e-4
    decay: float = 1e-2
    text_rate: float | None = None
    validation: int = 1


def _booth(family: Literal["sd", "sdxl", "sd3", "flux"], rate: float, *, lora: bool, decay: float = 1e-2,
           text_rate: float | None = None) -> Script:  # fmt: skip
    return Script(
        method="dreambooth", family=family, lora=lora, batch=4, epochs=1, rate=rate, decay=decay, text_rate=text_rate,
        out="dreambooth-model", validation=50,
    )  # fmt: skip


SCRIPTS = {
    "train_text_to_image.py": Script(method="finetune", validation=5),
    "train_text_to_image_sdxl.py": Script(method="finetune", family="sdxl"),
    "train_text_to_image_lora.py": Script(method="finetune", lora=True),
    "train_text_to_image_lora_sdxl.py": Script(method="finetune", family="sdxl", lora=True),
    "train_dreambooth.py": _booth("sd", 5e-6, lora=False),
    "train_dreambooth_lora.py": _booth("sd", 5e-4, lora=True),
    "train_dreambooth_lora_sdxl.py": _booth("sdxl", 1e-4, lora=True, decay=1e-4, text_rate=5e-6),
    "train_dreambooth_sd3.py": _booth("sd3", 1e-4, lora=False, decay=1e-4, text_rate=5e-6),
    "train_dreambooth_lora_sd3.py": _booth("sd3", 1e-4, lora=True, decay=1e-4, text_rate=5e-6),
    "train_dreambooth_flux.py": _booth("flux", 1e-4, lora=False, decay=1e-4, text_rate=5e-6),
    "train_dreambooth_lora_flux.py": _booth("flux", 1e-4, lora=True, decay=1e-4, text_rate=5e-6),
    "textual_inversion.py": Script(
        method="textual_inversion", out="text-inversion-model", steps=5000, rate=1e-4
    ),
    "train_controlnet.py": Script(method="controlnet", out="controlnet-model", batch=4, epochs=1, rate=5e-6),
    "train_controlnet_sdxl.py": Script(
        method="controlnet", family="sdxl", out="controlnet-model", batch=4, epochs=1, rate=5e-6
    ),
}  # fmt: skip
