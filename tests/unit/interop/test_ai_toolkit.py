"""ai-toolkit's jobs with the settings of its published examples; times against its own definition."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config.schema import RunConfig, load_run
from ldm.diffusion.schedule import Flow
from ldm.interop import ai_toolkit
from ldm.interop.sheet import Converted
from ldm.objectives.preserve import Preserve
from ldm.recipes.finetune import FinetuneTask
from ldm.recipes.samples import PromptSettings

JOB: dict[str, Any] = {
    "job": "extension",
    "config": {"name": "my_first_flux_lora_v1", "process": [{
        "type": "sd_trainer", "training_folder": "output", "device": "cuda:0",
        "network": {"type": "lora", "linear": 16, "linear_alpha": 16},
        "save": {"dtype": "float16", "save_every": 250, "max_step_saves_to_keep": 4, "push_to_hub": False},
        "datasets": [{"folder_path": "images", "caption_ext": "txt", "caption_dropout_rate": 0.05,
                      "shuffle_tokens": False, "cache_latents_to_disk": True, "resolution": [512, 768, 1024]}],
        "train": {"batch_size": 1, "steps": 2000, "gradient_accumulation_steps": 1, "train_unet": True,
                  "train_text_encoder": False, "gradient_checkpointing": True, "noise_scheduler": "flowmatch",
                  "optimizer": "adamw8bit", "lr": "1e-4", "ema_config": {"use_ema": True, "ema_decay": 0.99},
                  "dtype": "bf16"},
        "model": {"name_or_path": "black-forest-labs/FLUX.1-dev", "is_flux": True, "quantize": True},
        "sample": {"sampler": "flowmatch", "sample_every": 250, "sample_start_step": 0, "width": 1024, "height": 768,
                   "prompts": ["[trigger] holding a sign", "a horse is a DJ"], "neg": "", "seed": 42,
                   "walk_seed": True, "guidance_scale": 4, "sample_steps": 20},
    }]},
    "meta": {"name": "[name]", "version": "1.0"},
}  # fmt: skip
"""config/examples/train_lora_flux_24gb.yaml, with a height of its own."""


def job(**changes: Any) -> dict[str, Any]:
    """The job with other settings, SECTION__KEY=value; None takes one out."""
    tree = copy.deepcopy(JOB)
    process = tree["config"]["process"][0]
    for name, value in changes.items():
        section, _, key = name.partition("__")
        place: dict[str, Any] = process
        if key:
            place = process["datasets"][0] if section == "data" else process[section]
        place[key or section] = value
        if value is None:
            del place[key or section]
    return tree


def read(tree: dict[str, Any]) -> tuple[Converted, RunConfig]:
    found = ai_toolkit.convert(tree)
    return found, load_run(found.tree)


def test_the_flux_example() -> None:
    found, run = read(job(trigger_word="p3r5on"))
    assert found.refused == []
    task = run.task
    assert isinstance(task, FinetuneTask)
    assert task.adapter.kind == "lora"
    assert (task.adapter.rank, task.adapter.alpha, task.adapter.text) == (16, 16.0, False)
    assert (run.name, run.out) == ("my_first_flux_lora_v1", Path("output/my_first_flux_lora_v1"))
    assert (run.train.optim.algorithm, run.train.optim.lr, run.train.optim.eps) == ("adamw8bit", 1e-4, 1e-6)
    assert run.train.ema is not None
    assert (run.train.ema.decay, run.train.ema.warmup) == (0.99, False)
    assert (run.train.engine.frozen, run.train.engine.precision) == ("int8", "bf16")
    assert (run.train.checkpoint.every, run.train.checkpoint.keep) == (250, 4)
    assert run.data.kind == "mixture"
    assert [s.data.size for s in run.data.sources] == [512, 768, 1024]
    assert {s.share for s in run.data.sources} == {"size"}
    assert {s.data.trigger for s in run.data.sources} == {"p3r5on"}
    assert (task.options.drop, task.options.guidance, task.cache is not None) == (0.05, 1.0, True)
    assert task.samples.prompts == ("p3r5on holding a sign", "a horse is a DJ")
    settings = task.samples.settings
    assert (settings.sampler, settings.steps, settings.guidance, settings.size) == ("euler", 20, 4.0, (768, 1024))
    assert len(found.before) == 3
    assert {row.key for row in found.rows if row.fate == "near"} == {"model.quantize", "network.type"}


SAME = [
    ({"train__min_snr_gamma": 5.0, "model__is_flux": None, "model__is_xl": True, "train__noise_scheduler": "ddpm"},
     "task.weighting.gamma", 5.0),
    ({"train__noise_offset": 0.05}, "task.options.offset_noise", 0.05),
    ({"train__gradient_accumulation_steps": 4}, "train.steps", 500),
    ({"train__gradient_accumulation_steps": 4}, "train.batch", 4),
    ({"train__gradient_accumulation_steps": None, "train__gradient_accumulation": 4}, "train.steps", 2000),
    ({"train__gradient_accumulation_steps": None, "train__gradient_accumulation": 4}, "train.accumulate", 4),
    ({"train__optimizer": "adamw", "train__optimizer_params": {"weight_decay": 1e-4}},
     "train.optim.weight_decay", 1e-4),
    ({"train__ema_config": {"use_ema": False}}, "train.ema", None),
    ({"train__optimizer": "prodigy"}, "train.optim.lr", 1.0),
    ({"train__loss_type": "mae"}, "task.options.loss.kind", "l1"),
    ({"train__min_denoising_steps": 100, "train__max_denoising_steps": 700, "model__is_flux": None,
      "model__is_xl": True, "train__noise_scheduler": "ddpm"}, "task.options.min_timestep", 300),
    ({"train__min_denoising_steps": 100, "train__max_denoising_steps": 700, "model__is_flux": None,
      "model__is_xl": True, "train__noise_scheduler": "ddpm"}, "task.options.max_timestep", 900),
    ({"data__mask_path": "/m", "data__mask_min_value": 0.1}, "task.options.mask.outside", 0.1),
    ({"data__alpha_mask": True}, "task.options.mask.normalize", True),
    ({"train__optimizer": "prodigy", "train__optimizer_params": {"d_coef": 0.8}}, "train.optim.prodigy.d_coef", 0.8),
    ({"train__optimizer": "adafactor"}, "train.optim.adafactor.relative_step", False),
    ({"train__unet_lr": 3e-4}, "train.optim.lr", 3e-4),
    ({"network": None, "train__lr": 1e-5}, "task.adapter.kind", "full"),
    ({"data__resolution": 512, "data__flip_x": True}, "data.flip", True),
    ({"data__resolution": [1024], "data__num_repeats": 3}, "data.repeats", 3),
    ({"data__resolution": 512, "data__shuffle_tokens": True}, "data.tags.keep", 0),
    ({"data__resolution": 512, "data__buckets": False}, "data.buckets", False),
    ({"train__disable_sampling": True}, "task.samples.prompts", ()),
    ({"network__type": "lokr", "network__lokr_factor": 8}, "task.adapter.algo", "lokr"),
    ({"network__type": "lokr", "network__lokr_factor": 8}, "task.adapter.factor", 8),
    ({"network__type": "lokr", "network__lokr_full_rank": True}, "task.adapter.full_matrix", True),
    ({"network__dropout": 0.1}, "task.adapter.rank_dropout", 0.1),
    ({"network__pretrained_lora_path": "a.safetensors"}, "task.adapter.start", "a.safetensors"),
    ({"network__network_kwargs": {"only_if_contains": ["blocks.7.proj_out"]}}, "task.adapter.include",
     (r"blocks\.7\.proj_out",)),
    ({"network__network_kwargs": {"ignore_if_contains": ["single"]}}, "task.adapter.exclude", ("single",)),
    ({"train__skip_first_sample": True}, "task.samples.first", False),
    ({"train__diff_output_preservation": True, "train__diff_output_preservation_multiplier": 0.5,
      "train__diff_output_preservation_class": "dog"}, "task.preserve", Preserve(word="dog", weight=0.5)),
    ({"train__blank_prompt_preservation": True}, "task.preserve", Preserve(kind="blank")),
    ({"sample__walk_seed": False}, "task.samples.walk_seed", False),
    ({"sample__walk_seed": True}, "task.samples.walk_seed", True),
    ({"sample__samples": [{"prompt": "c", "seed": 7, "width": 512, "height": 768}],
      "sample__prompts": ["a", "b --s 9"]},
     "task.samples.own", (PromptSettings(), PromptSettings(steps=9), PromptSettings(seed=7, size=(768, 512)))),
    ({"data__resolution": 512, "data__token_dropout_rate": 0.2}, "data.tags.dropout", 0.2),
    ({"data__resolution": 512, "data__trigger_word": "sks"}, "data.trigger", "sks"),
    ({"model__quantize": False}, "train.engine.frozen", "fp32"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "key", "value"), SAME, ids=[f"{next(iter(c))}-{k}" for c, k, _ in SAME])
def test_key_by_key(changes: dict[str, Any], key: str, value: Any) -> None:
    found, run = read(job(**changes))
    assert found.refused == []
    value_here: Any = run
    for name in key.split("."):
        value_here = getattr(value_here, name)
    assert value_here == value


REFUSED = [
    ({"train__optimizer": "automagic"}, "train.optimizer"),
    ({"train__loss_type": "wavelet"}, "train.loss_type"),
    ({"train__max_denoising_steps": 500}, "train.max_denoising_steps"),
    ({"data__alpha_mask": True, "data__invert_mask": True}, "datasets[0].invert_mask"),
    (
        {"train__diff_output_preservation": True, "train__blank_prompt_preservation": True, "trigger_word": "p3r5on"},
        "train.blank_prompt_preservation",
    ),
    ({"train__timestep_type": "weighted"}, "train.timestep_type"),
    ({"train__content_or_style": "style"}, "train.content_or_style"),
    ({"model__assistant_lora_path": "a/b"}, "model.assistant_lora_path"),
    ({"network__type": "loha"}, "network.type"),
    ({"network__network_kwargs": {"conv_rank": 3}}, "network.network_kwargs"),
    ({"train__train_unet": False}, "train.train_unet"),
    ({"data__default_caption": "a photo"}, "datasets[0].default_caption"),
    ({"train__something_new": 3}, "train.something_new"),
    ({"model__is_flux": None, "model__arch": "qwen_image", "train__noise_scheduler": "ddpm"}, "model.arch"),
]


@pytest.mark.parametrize(("changes", "key"), REFUSED, ids=[k for _, k in REFUSED])
def test_what_is_not_here_is_refused_by_name(changes: dict[str, Any], key: str) -> None:
    assert [row.key for row in ai_toolkit.convert(job(**changes)).refused] == [key]


@pytest.mark.parametrize(
    ("arch", "name", "shift"),
    [("is_v3", "stabilityai/stable-diffusion-3.5-large", 3.0), ("zimage", "Tongyi-MAI/Z-Image-Turbo", 3.0),
     ("zimage", "Tongyi-MAI/Z-Image", 6.0)],
)  # fmt: skip
@pytest.mark.parametrize("how", ["linear", "sigmoid"])
def test_times_are_theirs_through_the_schedules_own_shift(arch: str, name: str, shift: float, how: str) -> None:
    """set_train_timesteps: "linear" is even, "sigmoid" is sigmoid(N(0, 1)), neither shifted."""
    model = {"name_or_path": name, arch: True} if arch.startswith("is_") else {"name_or_path": name, "arch": arch}
    task = read(job(model=model, train__timestep_type=how))[1].task
    assert isinstance(task, FinetuneTask)
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    density: Any = task.density
    times = Flow(shift=shift).sample(density.warp(u)).double() / 1000
    expected = u if how == "linear" else torch.sigmoid(torch.special.ndtri(u))
    torch.testing.assert_close(times, expected, atol=1e-6, rtol=0)


def test_jobs_that_do_not_train() -> None:
    with pytest.raises(ValueError, match=r"process\[0\]\.type: 'textual_inversion_trainer': not here; allowed are sd"):
        ai_toolkit.convert(job(type="textual_inversion_trainer"))
    with pytest.raises(ValueError, match=r"datasets\[0\]\.folder_path: missing"):
        ai_toolkit.convert(job(data__folder_path=None))
