"""sd-scripts' settings, those of its documents among them, key by key; what they mean against its own formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.config.schema import RunConfig, load_run
from ldm.diffusion.density import FluxShift
from ldm.diffusion.prediction import Epsilon, V
from ldm.diffusion.schedule import Flow
from ldm.diffusion.shape import Absolute, Huber, SmoothL1
from ldm.interop import kohya
from ldm.interop.sheet import Converted
from ldm.objectives.masked import MaskOptions
from ldm.recipes.finetune import FinetuneTask, Finetuning
from ldm.recipes.inversion import InversionTask
from tests.unit.interop.pictures import folder

BASE = {"pretrained_model_name_or_path": "org/model", "output_dir": "out", "output_name": "mine"}
LORA = BASE | {"network_module": "networks.lora", "network_dim": 16, "max_train_steps": 100}


def read(given: dict[str, Any], data: dict[str, Any] | None = None, script: str = "") -> tuple[Converted, RunConfig]:
    found = kohya.convert(given, data, script)
    return found, load_run(found.tree)


def made(given: dict[str, Any], images: Path, script: str = "") -> RunConfig:
    found, run = read(LORA | {"train_data_dir": str(images)} | given, None, script)
    assert found.refused == []
    return run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder(tmp_path / "train" / "10_sks dog", 5, captions=False)
    return tmp_path / "train"


def test_the_documents_lora(tmp_path: Path) -> None:
    """The call of docs/train_network.md with the data set of docs/train_README-en.md."""
    place = folder(tmp_path / "hoge", 7, suffix=".caption")
    given = BASE | {
        "dataset_config": "my_dataset_config.toml", "save_model_as": "safetensors", "network_module": "networks.lora",
        "network_dim": "16", "network_alpha": "1", "learning_rate": "1e-4", "optimizer_type": "AdamW8bit",
        "lr_scheduler": "constant", "sdpa": True, "max_train_epochs": "10", "save_every_n_epochs": "1",
        "mixed_precision": "bf16", "gradient_checkpointing": True,
    }  # fmt: skip
    subset = {"image_dir": str(place), "caption_extension": ".caption", "num_repeats": 10}
    data = {"general": {"enable_bucket": True}, "datasets": [{"resolution": 512, "batch_size": 4, "subsets": [subset]}]}
    found, run = read(given, data)
    assert found.refused == []
    assert found.before == (
        f'ldm data build "{place}" out/mine/data/0 --buckets 512 --bucket-step 64 --bucket-ratio 4 --bucket-least 1',
    )
    task = run.task
    assert isinstance(task, FinetuneTask)
    assert task.adapter.kind == "lora"
    assert (task.adapter.rank, task.adapter.alpha, task.adapter.text) == (16, 1.0, True)
    assert task.adapter.targets == ("attention", "feed_forward", "projection")
    assert task.gradient_checkpointing == "block"
    assert (run.train.optim.algorithm, run.train.optim.lr, run.train.optim.decay) == ("adamw8bit", 1e-4, "constant")
    assert run.train.steps == 10 * math.ceil(7 * 10 / 4)
    assert run.train.checkpoint.every == math.ceil(7 * 10 / 4)
    assert (run.train.batch, run.train.engine.precision) == (4, "bf16")
    assert run.data.kind == "shards"
    assert (run.data.buckets, run.data.repeats, run.data.size) == (True, 10, 512)


def test_the_documents_sdxl_lora_does_not_train_text_that_it_caches(images: Path) -> None:
    """The call of docs/sdxl_train_network.md: cached states of the text encoders, whose rates then say nothing."""
    given = {"unet_lr": 1e-4, "learning_rate": 1e-4, "text_encoder_lr1": 1e-5, "text_encoder_lr2": 1e-5,
             "network_alpha": 16, "cache_text_encoder_outputs": True, "cache_latents": True}  # fmt: skip
    run = made(given, images, "sdxl_train_network.py")
    assert isinstance(run.task, FinetuneTask)
    assert run.task.adapter.text is False
    assert run.task.cache == Path("out/mine/cache")


SAME = [  # their key and value, our key, our value
    ({"network_alpha": 8}, "task.adapter.alpha", 8.0),
    ({}, "task.adapter.alpha", 1.0),
    ({"network_train_unet_only": True}, "task.adapter.text", False),
    ({"text_encoder_lr": 0}, "task.adapter.text", False),
    ({"network_args": ["conv_dim=16", "conv_alpha=1"]}, "task.adapter.targets",
     ("attention", "feed_forward", "projection", "convolution", "time")),
    ({"unet_lr": "5e-5", "text_encoder_lr": "5e-5"}, "train.optim.lr", 5e-5),
    ({"noise_offset": 0.0357}, "task.options.offset_noise", 0.0357),
    ({"ip_noise_gamma": 0.1}, "task.options.input_perturbation", 0.1),
    ({"min_snr_gamma": 5}, "task.weighting.gamma", 5.0),
    ({"debiased_estimation_loss": True}, "task.weighting.kind", "debiased"),
    ({"scale_v_pred_loss_like_noise_pred": True}, "task.weighting.kind", "snr"),
    ({"shuffle_caption": True, "keep_tokens": 2}, "data.tags.keep", 2),
    ({"shuffle_caption": True, "cache_latents": True}, "task.cache", None),
    ({"caption_dropout_rate": 0.05}, "task.options.drop", 0.05),
    ({"caption_tag_dropout_rate": 0.2}, "data.tags.dropout", 0.2),
    ({"caption_prefix": "art by me,"}, "data.template", "art by me, {}"),
    ({"shuffle_caption": True, "caption_prefix": "me"}, "data.tags.prefix", "me"),
    ({"shuffle_caption": True, "keep_tokens_separator": "|||"}, "data.tags.keep_separator", "|||"),
    ({"shuffle_caption": True, "secondary_separator": ";;;"}, "data.tags.secondary", ";;;"),
    ({"enable_wildcard": True, "cache_latents": True}, "data.wildcards", True),
    ({"enable_wildcard": True, "cache_latents": True}, "task.cache", None),
    ({"color_aug": True}, "data.colour", 0.05),
    ({"network_module": "lycoris.kohya", "network_args": ["algo=loha", "dora_wd=True"]}, "task.adapter.algo", "loha"),
    ({"network_module": "lycoris.kohya", "network_args": ["algo=loha", "dora_wd=True"]}, "task.adapter.dora", True),
    ({"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "factor=8"]}, "task.adapter.factor", 8),
    ({"network_module": "lycoris.kohya", "network_args": ["algo=diag-oft", "constraint=0.1"]},
     "task.adapter.constraint", 0.1),
    ({"network_args": ["rank_dropout=0.2", "module_dropout=0.1"]}, "task.adapter.module_dropout", 0.1),
    ({"network_dropout": 0.1}, "task.adapter.rank_dropout", 0.1),
    ({"network_weights": "a.safetensors", "dim_from_weights": True}, "task.adapter.start", "a.safetensors"),
    ({"scale_weight_norms": 1.0}, "task.adapter.max_norm", 1.0),
    ({"sample_at_first": True}, "task.samples.first", True),
    ({}, "task.samples.first", False),
    ({"validation_split": 0.1, "validate_every_n_steps": 50}, "train.validate.share", 0.1),
    ({"validation_split": 0.1, "validate_every_n_steps": 50}, "train.validate.every", 50),
    ({"resolution": "768,768"}, "data.size", 768),
    ({"resolution": [768, 768]}, "data.size", 768),
    ({"flip_aug": True}, "data.flip", True),
    ({"random_crop": True}, "data.crop", "random"),
    ({"train_batch_size": 2, "gradient_accumulation_steps": 4}, "train.batch", 8),
    ({"train_batch_size": 2, "gradient_accumulation_steps": 4}, "train.accumulate", 4),
    ({"train_batch_size": 2, "num_processes": 4}, "train.batch", 8),
    ({"max_train_epochs": 3, "train_batch_size": 4}, "train.steps", 3 * math.ceil(50 / 4)),
    ({"max_train_epochs": 3, "train_batch_size": 4, "gradient_accumulation_steps": 2}, "train.steps", 3 * 7),
    ({"lr_scheduler": "cosine", "lr_warmup_steps": 0.1}, "train.optim.warmup", 10),
    ({"lr_scheduler": "constant", "lr_warmup_steps": 50}, "train.optim.warmup", 0),
    ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 50}, "train.optim.warmup", 50),
    ({"optimizer_type": "Lion", "optimizer_args": ["weight_decay=0.1", "betas=.9,.99"]},
     "train.optim.betas", (0.9, 0.99)),
    ({"optimizer_type": "PagedAdamW8bit"}, "train.optim.algorithm", "adamw8bit"),
    ({"use_8bit_adam": True}, "train.optim.algorithm", "adamw8bit"),
    ({"optimizer_type": "Lion"}, "train.optim.weight_decay", 0.0),
    ({"optimizer_type": "Prodigy", "learning_rate": 1.0, "optimizer_args": ["d_coef=2", "use_bias_correction=True",
      "safeguard_warmup=True", "decouple=True"]}, "train.optim.prodigy.bias_correction", True),
    ({"optimizer_type": "Prodigy", "learning_rate": 1.0, "optimizer_args": ["d_coef=2"]},
     "train.optim.prodigy.d_coef", 2.0),
    ({"optimizer_type": "Prodigy", "learning_rate": 1.0}, "train.optim.weight_decay", 0.0),
    ({"optimizer_type": "Adafactor", "optimizer_args": ["scale_parameter=False", "relative_step=False",
      "warmup_init=False"], "lr_scheduler": "cosine"}, "train.optim.decay", "cosine"),
    ({"optimizer_type": "Adafactor", "lr_scheduler": "cosine", "lr_warmup_steps": 9}, "train.optim.decay", "constant"),
    ({"optimizer_type": "Adafactor"}, "train.optim.adafactor.scale_parameter", True),
    ({"optimizer_type": "pytorch_optimizer.CAME", "optimizer_args": ["betas=0.9,0.999,0.99", "weight_decay=0.01"]},
     "train.optim.came.beta3", 0.99),
    ({"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "cosine", "lr_warmup_steps": 9,
      "optimizer_args": ["warmup_steps=20"]}, "train.optim.warmup", 20),
    ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3}, "train.optim.course.cycles", 3),
    ({"lr_scheduler": "polynomial", "lr_scheduler_power": 2}, "train.optim.course.power", 2.0),
    ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1}, "train.optim.final", 0.1),
    ({"lr_scheduler": "cosine", "lr_scheduler_min_lr_ratio": 0.1}, "train.optim.final", 0.0),
    ({"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 0.2}, "train.optim.course.cooldown", 20),
    ({"lr_scheduler": "inverse_sqrt", "lr_scheduler_timescale": 40}, "train.optim.course.timescale", 40),
    ({"unet_lr": 1e-4, "text_encoder_lr": 1e-5}, "train.optim.rates.text", 1e-5),
    ({"unet_lr": 1e-4, "text_encoder_lr": [1e-5, 5e-6]}, "train.optim.rates.text", (1e-5, 5e-6)),
    ({"unet_lr": 1e-4, "learning_rate": 2e-5}, "train.optim.rates.text", 2e-5),
    ({"network_args": ["loraplus_lr_ratio=16"]}, "train.optim.rates.lora_plus", 16.0),
    ({"loss_type": "huber"}, "task.options.loss", Huber(schedule="snr", c=0.1)),
    ({"loss_type": "smooth_l1", "huber_schedule": "exponential", "huber_c": 0.2, "huber_scale": 2},
     "task.options.loss", SmoothL1(schedule="exponential", c=0.2, scale=2.0)),
    ({"loss_type": "l1"}, "task.options.loss", Absolute()),
    ({"multires_noise_iterations": 6}, "task.options.multires_iterations", 6),
    ({"multires_noise_iterations": 6, "multires_noise_discount": 0.2}, "task.options.multires_discount", 0.2),
    ({"min_timestep": 100, "max_timestep": 900}, "task.options.min_timestep", 100),
    ({"min_timestep": 100, "max_timestep": 900}, "task.options.max_timestep", 900),
    ({"masked_loss": True, "conditioning_data_dir": "masks"}, "task.masks", "masks"),
    ({"masked_loss": True, "alpha_mask": True}, "task.options.mask", MaskOptions()),
    ({"alpha_mask": True}, "data.pairs.loss_weight.channels", 1),
    ({"max_grad_norm": 0}, "train.engine.clip", 0.0),
    ({"fp8_base": True}, "train.engine.frozen", "int8"),
    ({"deepspeed": True, "zero_stage": 2, "offload_optimizer_device": "cpu"}, "train.engine.offload_optimizer", True),
    ({"seed": 42}, "seed", 42),
    ({"save_every_n_steps": 25}, "train.checkpoint.every", 25),
    ({"sample_every_n_steps": 20, "sample_sampler": "euler_a"}, "task.samples.settings.sampler", "euler_ancestral"),
    ({"clip_skip": 1, "max_token_length": 75, "loss_type": "l2", "huber_c": 0.1}, "task.adapter.rank", 16),
]  # fmt: skip


@pytest.mark.parametrize(("given", "key", "value"), SAME, ids=[" ".join(g) + "-" + k for g, k, _ in SAME])
def test_key_by_key(given: dict[str, Any], key: str, value: Any, images: Path) -> None:
    run: Any = made(given, images)
    for name in key.split("."):
        run = run[name] if isinstance(run, dict) else getattr(run, name)
    assert run == value


def test_masks_in_buckets_are_read_as_the_set_is_built(images: Path) -> None:
    given = LORA | {"train_data_dir": str(images), "masked_loss": True, "enable_bucket": True}
    for more, option in (({"alpha_mask": True}, '--pair loss_weight="alpha"'),
                         ({"conditioning_data_dir": "/m"}, '--pair loss_weight="/m/"')):  # fmt: skip
        found, run = read(given | more, None)
        assert found.refused == []
        assert option in found.before[0]
        assert run.data.pairs["loss_weight"].kind == "stored"  # type: ignore[union-attr]


def test_rates_of_sdxls_blocks(images: Path) -> None:
    """sdxl_train.py: embeddings, nine input blocks, three of the middle, nine output blocks, the last layers."""
    given = {
        "network_module": None,
        "network_dim": None,
        "learning_rate": 1e-5,
        "block_lr": ",".join(f"{i}e-6" for i in range(23)),
    }
    run = made(given, images, "sdxl_train.py")
    shares = run.train.optim.rates.blocks
    for name, index in (("time_embedding", 0), ("conv_in", 1), ("down_blocks.0.downsamplers", 4),
                        ("down_blocks.2.attentions.1", 9), ("mid_block.attentions.0", 11),
                        ("up_blocks.0.upsamplers", 15), ("up_blocks.2.resnets.2", 21), ("conv_out", 22)):  # fmt: skip
        assert shares[name] == pytest.approx(index / 10)


REFUSED = [
    ({"optimizer_type": "DAdaptAdam"}, "optimizer_type", "DAdaptAdam: not here"),
    (
        {"optimizer_type": "Prodigy", "learning_rate": 1, "optimizer_args": ["decouple=False"]},
        "optimizer_args",
        "decouple: not here",
    ),
    ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler", "not here"),
    ({"lr_scheduler": "warmup_stable_decay"}, "lr_scheduler", "a number of steps to decay"),
    ({"network_args": ["loraplus_unet_lr_ratio=4"]}, "network_args", "one ratio for all"),
    ({"network_module": "lycoris.kohya", "network_args": ["algo=boft"]}, "network_args", "algo=boft: not here"),
    (
        {"network_module": "lycoris.kohya", "network_args": ["algo=loha", "use_tucker=True"]},
        "network_args",
        "use_tucker",
    ),
    ({"network_args": ["conv_dim=8"]}, "network_args", "one rank"),
    ({"loss_type": "huber", "huber_schedule": "linear"}, "huber_schedule", "linear"),
    ({"loss_type": "lpips"}, "loss_type", "not here"),
    ({"masked_loss": True}, "masked_loss", "no masks"),
    ({"conditioning_data_dir": "masks"}, "conditioning_data_dir", "without masked_loss"),
    ({"min_snr_gamma": 5, "debiased_estimation_loss": True}, "debiased_estimation_loss", "one weighting"),
    ({"v_parameterization": True, "debiased_estimation_loss": True}, "debiased_estimation_loss", "predicts v"),
    ({"zero_terminal_snr": True}, "zero_terminal_snr", "the base's"),
    ({"clip_skip": 2}, "clip_skip", "another layer"),
    ({"full_bf16": True}, "full_bf16", "float32"),
    ({"caption_extension": ".cap"}, "caption_extension", "rename"),
    ({"resolution": "768,512"}, "resolution", "one length"),
    ({"an_option_of_tomorrow": 3}, "an_option_of_tomorrow", "not known"),
]


@pytest.mark.parametrize(("given", "key", "why"), REFUSED, ids=[next(reversed(g)) for g, _, _ in REFUSED])
def test_what_is_not_here_is_refused_by_name(given: dict[str, Any], key: str, why: str, images: Path) -> None:
    rows = kohya.convert(LORA | {"train_data_dir": str(images)} | given, None).refused
    assert [row.key for row in rows] == [key]
    assert why in rows[0].note


def test_the_documents_data_sets(tmp_path: Path) -> None:
    """docs/config_README-en.md: settings of a folder over its data set's over the general ones; reg pictures weigh."""
    places = [folder(tmp_path / n, c) for n, c in (("hoge", 4), ("fuga", 2))]
    reg = folder(tmp_path / "reg", 3, captions=False)
    subsets = [
        {"image_dir": str(places[0]), "class_tokens": "hoge girl"},
        {"image_dir": str(places[1]), "class_tokens": "fuga boy", "keep_tokens": 3},
        {"is_reg": True, "image_dir": str(reg), "class_tokens": "human", "keep_tokens": 1},
    ]
    data = {
        "general": {"shuffle_caption": True, "caption_extension": ".txt", "keep_tokens": 1},
        "datasets": [{"resolution": 512, "batch_size": 4, "keep_tokens": 2, "subsets": subsets}],
    }
    given = LORA | {"prior_loss_weight": 0.5, "max_train_epochs": 2}
    found, run = read(given, data)
    assert found.refused == []
    assert run.data.kind == "mixture"
    assert [s.data.tags.keep for s in run.data.sources if s.data.tags] == [2, 3, 1]
    assert [s.weight for s in run.data.sources] == [1.0, 1.0, 0.5]
    shares = [s.share for s in run.data.sources]
    assert shares[2] == shares[0] + shares[1]  # as many of the class as of all others
    assert shares[0] == 2 * shares[1]
    assert [s.data.template for s in run.data.sources] == ["{}", "{}", "human{}"]
    assert run.train.steps == 2 * math.ceil(2 * 6 / 4)
    assert "--without-captions" in found.before[2]
    assert "--without-captions" not in found.before[0]


def test_class_tokens_of_a_folder_that_is_half_captioned_are_refused(tmp_path: Path) -> None:
    place = folder(tmp_path / "a", 3)
    (place / "0.txt").unlink()
    data = {"datasets": [{"subsets": [{"image_dir": str(place), "class_tokens": "sks dog"}]}]}
    refused = kohya.convert(LORA, data).refused
    assert [row.key for row in refused] == ["class_tokens"]
    assert "2 pictures have captions, 1 have none" in refused[0].note


@pytest.mark.parametrize(
    ("side", "least", "most", "ratio"), [(512, 256, 1024, 4.0), (1024, 256, 1024, 1.0), (1024, 512, 2048, 4.0)]
)
def test_buckets_reach_as_far_as_their_sides_may(
    tmp_path: Path, side: int, least: int, most: int, ratio: float
) -> None:
    """A bucket of the side's area whose sides lie between the two is most / (side^2 / most) to one at most."""
    place = folder(tmp_path / "a", 1)
    data = {"datasets": [{"resolution": side, "enable_bucket": True, "min_bucket_reso": least, "max_bucket_reso": most,
                          "subsets": [{"image_dir": str(place)}]}]}  # fmt: skip
    assert f"--bucket-ratio {ratio:g} " in kohya.convert(LORA, data).before[0]


def test_epochs_need_the_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_train_epochs: 3 epochs are steps only where the pictures can be counted"):
        kohya.convert(LORA | {"max_train_epochs": 3, "train_data_dir": str(tmp_path / "gone")}, None)


def test_half_a_configuration_says_so(images: Path) -> None:
    with pytest.raises(ValueError, match="pretrained_model_name_or_path: missing; is this the data set's half"):
        kohya.convert({}, {"datasets": [{"subsets": [{"image_dir": str(images)}]}]})
    with pytest.raises(ValueError, match="no folder of pictures: train_data_dir or dataset_config"):
        kohya.convert(LORA, None)


def test_textual_inversion(tmp_path: Path) -> None:
    place = folder(tmp_path / "a", 3, captions=False)
    given = BASE | {"token_string": "mychar4", "init_word": "cute girl", "num_vectors_per_token": 4,
                    "learning_rate": 1e-6, "use_object_template": True, "train_data_dir": str(place),
                    "max_train_steps": 1600}  # fmt: skip
    found, run = read(given, None, "train_textual_inversion.py")
    assert found.refused == []
    assert isinstance(run.task, InversionTask)
    concept = run.task.concepts[0]
    assert (concept.token, concept.vectors, concept.initializer) == ("mychar4", 4, ("cute", "girl"))
    assert (concept.images, concept.learn, run.task.max_norm) == (place, "object", 0.0)
    assert run.train.optim.weight_decay == 0
    assert any(row.ours == "train.optim.weight_decay" and "zero" in row.note for row in found.rows)


@pytest.mark.parametrize("prediction", [Epsilon(), V()], ids=["noise", "velocity"])
def test_min_snr_is_their_weight(prediction: Epsilon | V, images: Path) -> None:
    """apply_snr_weight: min(SNR, gamma) / SNR of the noise's error, / (SNR + 1) of v's."""
    task = made({"min_snr_gamma": 5}, images).task
    assert isinstance(task, Finetuning)
    sigma = torch.linspace(0.05, 0.999, 40, dtype=torch.float64)
    alpha = (1 - sigma**2).sqrt()
    snr = (alpha / sigma) ** 2
    theirs = snr.clamp(max=5) / (snr if isinstance(prediction, Epsilon) else snr + 1)
    torch.testing.assert_close(task.weighting.weight(alpha, sigma, prediction), theirs)


def test_scaled_v_loss_is_their_weight(images: Path) -> None:
    """scale_v_prediction_loss_like_noise_prediction: SNR / (SNR + 1)."""
    task = made({"scale_v_pred_loss_like_noise_pred": True}, images).task
    assert isinstance(task, Finetuning)
    sigma = torch.linspace(0.05, 0.999, 40, dtype=torch.float64)
    alpha = (1 - sigma**2).sqrt()
    snr = (alpha / sigma) ** 2
    torch.testing.assert_close(task.weighting.weight(alpha, sigma, V()), snr / (snr + 1))


FLUX = {"network_module": "networks.lora_flux", "guidance_scale": 1.0, "model_prediction_type": "raw"}


def shifted(t: Tensor, shift: float) -> Tensor:
    return shift * t / (1 + (shift - 1) * t)


def normal(u: Tensor) -> Tensor:
    return torch.special.ndtri(u)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"timestep_sampling": "uniform"}, lambda u: u),
        ({"timestep_sampling": "sigmoid", "sigmoid_scale": 0.7}, lambda u: torch.sigmoid(0.7 * normal(u))),
        ({"timestep_sampling": "shift", "discrete_flow_shift": 3.1}, lambda u: shifted(torch.sigmoid(normal(u)), 3.1)),
        ({}, lambda u: shifted(u, 3.0)),  # timestep_sampling "sigma" with the shift that is theirs by default
    ],
    ids=["uniform", "sigmoid", "shift", "default"],
)  # fmt: skip
def test_the_times_of_flux(given: dict[str, Any], expected: Any, images: Path) -> None:
    """FLUX.1's own shift is dynamic and not in training, so that the density is the whole of it."""
    run = made(FLUX | given, images, "flux_train_network.py")
    assert isinstance(run.task, FinetuneTask)
    assert run.task.options.guidance == 1.0
    density: Any = run.task.density
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(density.warp(u), expected(u), atol=1e-6, rtol=0)


def test_flux_shift(images: Path) -> None:
    task = made(FLUX | {"timestep_sampling": "flux_shift", "sigmoid_scale": 1.2}, images, "flux_train_network.py").task
    assert isinstance(task, FinetuneTask)
    assert task.density == FluxShift(std=1.2)
    refused = kohya.convert(LORA | {"train_data_dir": str(images)} | FLUX | {"model_prediction_type": "additive"}, None,
                            "flux_train_network.py").refused  # fmt: skip
    assert [row.key for row in refused] == ["model_prediction_type"]


@pytest.mark.parametrize("shift", [1.0, 3.0, 2.5])
def test_the_times_of_sd3_are_theirs_through_the_schedules_own_shift(shift: float, images: Path) -> None:
    run = made({"network_module": "networks.lora_sd3", "training_shift": shift}, images, "sd3_train_network.py")
    assert isinstance(run.task, FinetuneTask)
    density: Any = run.task.density
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    times = Flow(shift=3.0).sample(density.warp(u)).double() / 1000
    torch.testing.assert_close(times, shifted(u, shift), atol=1e-6, rtol=0)


def test_sample_prompts_with_settings_that_all_share(tmp_path: Path, images: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# two\na cat --n low quality --w 768 --h 512 --s 28 --l 7.5 --d 1\na dog --n low quality --w 768 "
                    "--h 512 --s 28 --l 7.5 --d 2\n")  # fmt: skip
    found, run = read(LORA | {"train_data_dir": str(images), "sample_prompts": str(file)})
    settings = run.task.samples.settings  # type: ignore[union-attr]
    assert run.task.samples.prompts == ("a cat", "a dog")  # type: ignore[union-attr]
    assert (settings.steps, settings.guidance, settings.size, settings.negative) == (28, 7.5, (512, 768), "low quality")
    row = next(row for row in found.rows if row.key == "sample_prompts")
    assert row.fate == "kept"
    own = run.task.samples.own  # type: ignore[union-attr]
    assert [one.seed for one in own] == [1, 2]
    assert [one.steps for one in own] == [None, None]


def test_sections_of_a_config_file_are_one_list() -> None:
    assert kohya.flattened({"a": {"x": 1}, "y": 2, "b": {"z": [3]}}) == {"x": 1, "y": 2, "z": [3]}
