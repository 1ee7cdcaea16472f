"""diffusers' example scripts, called as their READMEs do, key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldm.config.schema import RunConfig, load_run
from ldm.interop import diffusers
from ldm.interop.sheet import Converted
from ldm.interop.words import Call
from ldm.recipes.controlnet import ControlTask
from ldm.recipes.dreambooth import DreamboothTask
from ldm.recipes.finetune import FinetuneTask
from ldm.recipes.inversion import InversionTask
from tests.unit.interop.pictures import folder


def read(script: str, given: dict[str, Any], **launcher: str) -> tuple[Converted, RunConfig]:
    options = {"pretrained_model_name_or_path": "org/model", "output_dir": "out"} | given
    found = diffusers.convert(Call(script, options, launcher))
    return found, load_run(found.tree)


@pytest.fixture
def dog(tmp_path: Path) -> Path:
    return folder(tmp_path / "dog", 5)


def test_text_to_image_as_the_readme_calls_it(dog: Path) -> None:
    """examples/text_to_image/README.md, its own folder of pictures."""
    found, run = read(
        "train_text_to_image.py",
        {"train_data_dir": str(dog), "use_ema": True, "resolution": "512", "center_crop": True, "random_flip": True,
         "train_batch_size": "1", "gradient_accumulation_steps": "4", "gradient_checkpointing": True,
         "max_train_steps": "15000", "learning_rate": "1e-05", "max_grad_norm": "1", "lr_scheduler": "constant",
         "lr_warmup_steps": "0"},
        mixed_precision="bf16",
    )  # fmt: skip
    assert found.refused == []
    task = run.task
    assert isinstance(task, FinetuneTask)
    assert (task.adapter.kind, task.adapter.text, task.images) == ("full", False, dog)
    assert (run.train.batch, run.train.accumulate, run.train.steps, run.train.optim.lr) == (4, 4, 15000, 1e-5)
    assert run.train.ema is not None
    assert (run.train.ema.decay, run.train.ema.warmup) == (0.9999, True)
    assert run.data.kind == "shards"
    assert (run.data.crop, run.data.flip, run.data.size) == ("center", True, 512)
    assert run.train.engine.precision == "bf16"


def test_lora_as_the_readme_calls_it(dog: Path) -> None:
    """Without steps it has epochs; a hub's data set comes from a folder that was downloaded."""
    given = {
        "dataset_name": "lambdalabs/pokemon-blip-captions", "caption_column": "text", "resolution": "512",
        "random_flip": True, "train_batch_size": "1", "num_train_epochs": "100", "checkpointing_steps": "5000",
        "learning_rate": "1e-04", "lr_scheduler": "constant", "lr_warmup_steps": "0", "seed": "42",
        "validation_prompt": "cute dragon creature", "report_to": "wandb", "push_to_hub": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"dataset_name: lambda.*: a hub's data set is not downloaded; .*--images"):
        read("train_text_to_image_lora.py", given)
    call = Call("train_text_to_image_lora.py", {"pretrained_model_name_or_path": "org/model"} | given, {})
    found = diffusers.convert(call, images=str(dog))
    run = load_run(found.tree)
    assert found.refused == []
    assert isinstance(run.task, FinetuneTask)
    adapter = run.task.adapter
    assert adapter.kind == "lora"
    assert (adapter.rank, adapter.alpha, adapter.targets, adapter.text) == (4, 4.0, ("attention",), False)
    assert (run.train.steps, run.train.checkpoint.every, run.seed) == (100 * 5, 5000, 42)
    assert run.train.log.wandb
    assert run.task.samples.prompts == ("cute dragon creature",)
    assert run.task.samples.every == 5  # each epoch, their default


def test_dreambooth_as_the_readme_calls_it(dog: Path) -> None:
    """examples/dreambooth/README.md: with prior preservation a batch is of as many class pictures again."""
    found, run = read(
        "train_dreambooth.py",
        {"instance_data_dir": str(dog), "class_data_dir": "path-to-class-images", "with_prior_preservation": True,
         "prior_loss_weight": "1.0", "instance_prompt": "a photo of sks dog", "class_prompt": "a photo of dog",
         "resolution": "512", "train_batch_size": "1", "use_8bit_adam": True, "gradient_checkpointing": True,
         "train_text_encoder": True, "learning_rate": "2e-6", "lr_scheduler": "constant", "lr_warmup_steps": "0",
         "num_class_images": "200", "max_train_steps": "800"},
    )  # fmt: skip
    assert found.refused == []
    task = run.task
    assert isinstance(task, DreamboothTask)
    assert task.instance_prompt == "a photo of sks dog"
    assert task.prior is not None
    assert (task.prior.prompt, task.prior.count) == ("a photo of dog", 200)
    assert task.prior.folder == Path("path-to-class-images")
    assert (task.adapter.kind, run.train.batch, run.train.optim.algorithm) == ("full", 2, "adamw8bit")
    assert task.adapter.text is True  # type: ignore[union-attr]
    assert run.data.kind == "mixture"
    assert [s.weight for s in run.data.sources] == [1.0, 1.0]
    assert [s.data.crop for s in run.data.sources] == ["random", "random"]  # theirs without --center_crop


def test_dreambooth_without_preservation_has_one_source(dog: Path) -> None:
    given = {"instance_data_dir": str(dog), "instance_prompt": "a photo of sks dog", "max_train_steps": "400"}
    run = read("train_dreambooth.py", given)[1]
    assert isinstance(run.task, DreamboothTask)
    assert (run.task.prior, run.data.kind, run.train.batch, run.train.optim.lr) == (None, "shards", 4, 5e-6)


def test_textual_inversion_as_the_readme_calls_it(dog: Path) -> None:
    found, run = read(
        "textual_inversion.py",
        {"use_auth_token": True, "train_data_dir": str(dog), "learnable_property": "object",
         "placeholder_token": "<cat-toy>", "initializer_token": "toy", "resolution": "512", "train_batch_size": "1",
         "gradient_accumulation_steps": "4", "max_train_steps": "3000", "learning_rate": "5.0e-04", "scale_lr": True,
         "lr_scheduler": "constant", "lr_warmup_steps": "0"},
        num_processes="2",
    )  # fmt: skip
    assert found.refused == []
    assert isinstance(run.task, InversionTask)
    concept = run.task.concepts[0]
    assert (concept.token, concept.initializer) == ("<cat-toy>", ("toy",))
    assert (concept.learn, concept.images) == ("object", dog)
    assert run.train.optim.lr == pytest.approx(5e-4 * 4 * 1 * 2)  # scale_lr
    assert (run.train.batch, run.train.engine.clip, run.train.optim.weight_decay) == (8, 0.0, 0.0)
    assert run.data.kind == "shards"
    assert (run.data.flip, run.data.fit) == (True, "stretch")


def test_controlnet_as_the_readme_calls_it(dog: Path) -> None:
    found, run = read(
        "train_controlnet.py",
        {"train_data_dir": str(dog), "resolution": "512", "learning_rate": "1e-5", "train_batch_size": "4",
         "max_train_steps": "1000", "validation_image": ["./conditioning_image_1.png", "./conditioning_image_2.png"],
         "validation_prompt": ["red circle with blue background", "cyan circle with brown floral background"],
         "set_grads_to_none": True, "proportion_empty_prompts": "0.5"},
    )  # fmt: skip
    assert found.refused == []
    assert isinstance(run.task, ControlTask)
    assert len(run.task.conditions) == len(run.task.samples.prompts) == 2
    assert run.task.options.drop == 0.5
    assert run.data.kind == "shards"
    assert run.data.pairs["condition"].kind == "stored"
    assert found.before == (f'ldm data build "{dog}" out/data/pictures --size 512 --pair condition=conditioning_image',)


SAME = [
    ({"rank": "16", "lora_alpha": "8"}, "task.adapter.alpha", 8.0),
    ({"rank": "16"}, "task.adapter.alpha", 16.0),
    ({"lora_dropout": "0.1"}, "task.adapter.dropout", 0.1),
    ({"use_dora": True}, "task.adapter.dora", True),
    ({"snr_gamma": "5.0"}, "task.weighting.gamma", 5.0),
    ({"noise_offset": "0.1"}, "task.options.offset_noise", 0.1),
    ({"train_text_encoder": True}, "task.adapter.text", True),
    ({"lr_scheduler": "cosine"}, "train.optim.warmup", 500),
    ({"lr_scheduler": "constant"}, "train.optim.warmup", 0),
    ({"adam_beta2": "0.99", "adam_epsilon": "1e-7"}, "train.optim.betas", (0.9, 0.99)),
    ({"checkpoints_total_limit": "3"}, "train.checkpoint.keep", 3),
    ({"dataloader_num_workers": "4"}, "workers", 4),
    ({"center_crop": True}, "data.crop", "center"),
    ({"center_crop": True}, "task.cache", Path("out/cache")),
    ({}, "task.cache", None),
    ({"allow_tf32": True}, "train.engine.tf32", True),
    ({"max_train_steps": "10", "num_train_epochs": "3"}, "train.steps", 10),
    ({"num_train_epochs": "3", "train_batch_size": "2"}, "train.steps", 9),
]


@pytest.mark.parametrize(("given", "key", "value"), SAME, ids=[" ".join(g) + "-" + k for g, k, _ in SAME])
def test_key_by_key(given: dict[str, Any], key: str, value: Any, dog: Path) -> None:
    steps = {} if "num_train_epochs" in given else {"max_train_steps": "100"}
    found, run = read("train_text_to_image_lora.py", {"train_data_dir": str(dog)} | steps | given)
    assert found.refused == []
    value_here: Any = run
    for name in key.split("."):
        value_here = getattr(value_here, name)
    assert value_here == value


REFUSED = [
    ({"optimizer": "sophia"}, "optimizer"),
    ({"optimizer": "prodigy", "learning_rate": "1.0", "prodigy_decouple": "false"}, "prodigy_decouple"),
    ({"revision": "non-ema"}, "revision"),
    ({"pretrained_vae_model_name_or_path": "madebyollin/sdxl-vae-fp16-fix"}, "pretrained_vae_model_name_or_path"),
    ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler"),
    ({"max_train_samples": "100"}, "max_train_samples"),
    ({"dream_training": True}, "dream_training"),
    ({"image_interpolation_mode": "bicubic"}, "image_interpolation_mode"),
    ({"something_new": "1"}, "something_new"),
]


@pytest.mark.parametrize(("given", "key"), REFUSED, ids=[k for _, k in REFUSED])
def test_what_is_not_here_is_refused_by_name(given: dict[str, Any], key: str, dog: Path) -> None:
    options = {"train_data_dir": str(dog), "max_train_steps": "10"} | given
    assert [row.key for row in read("train_text_to_image_lora_sdxl.py", options)[0].refused] == [key]


def test_text_encoders_have_their_own_rate(dog: Path) -> None:
    given = {"instance_data_dir": str(dog), "instance_prompt": "sks dog", "train_text_encoder": True,
             "max_train_steps": "9"}  # fmt: skip
    for rate, own in (("1e-4", 5e-6), ("5e-6", None)):  # theirs: 5e-6
        found, run = read("train_dreambooth_lora_sdxl.py", given | {"learning_rate": rate})
        assert found.refused == []
        assert run.train.optim.rates.text == own


def test_prodigy_has_their_scripts_settings(dog: Path) -> None:
    """examples/dreambooth/README_flux.md: its rate is 1, and the scripts turn two options on."""
    given = {"instance_data_dir": str(dog), "instance_prompt": "sks dog", "max_train_steps": "9",
             "optimizer": "prodigy", "learning_rate": "1.", "train_text_encoder": True}  # fmt: skip
    found, run = read("train_dreambooth_lora_sdxl.py", given)
    assert found.refused == []
    prodigy = run.train.optim.prodigy
    assert (run.train.optim.algorithm, run.train.optim.lr, run.train.optim.weight_decay) == ("prodigy", 1.0, 1e-4)
    assert (prodigy.bias_correction, prodigy.safeguard_warmup, prodigy.beta3) == (True, True, None)
    assert run.train.optim.rates.text is None


def test_flux_is_told_their_guidance(dog: Path) -> None:
    """examples/dreambooth/README_flux.md, but for Prodigy; its default is 3.5."""
    given = {"instance_data_dir": str(dog), "instance_prompt": "a photo of sks dog", "max_train_steps": "500"}
    for scale, more in ((1.0, {"guidance_scale": "1"}), (3.5, {})):
        task = read("train_dreambooth_lora_flux.py", given | more)[1].task
        assert isinstance(task, DreamboothTask)
        assert task.options.guidance == scale
        assert task.adapter.targets is None  # type: ignore[union-attr]


def test_scripts_that_are_not_here_and_words_that_are_no_numbers(dog: Path) -> None:
    with pytest.raises(ValueError, match=r"train_unconditional\.py: not here; allowed are textual_inversion\.py"):
        read("train_unconditional.py", {})
    with pytest.raises(ValueError, match=r"diffusers' scripts: rank: expected a whole number, got '4\.5'"):
        read("train_text_to_image_lora.py", {"train_data_dir": str(dog), "rank": "4.5"})
    with pytest.raises(ValueError, match="learning_rate: expected a number, got 'fast'"):
        read("train_text_to_image_lora.py", {"train_data_dir": str(dog), "learning_rate": "fast"})
