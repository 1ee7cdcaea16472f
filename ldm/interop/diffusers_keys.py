"""Arguments of diffusers' example scripts that change nothing that is trained here, and those that are not here."""

from __future__ import annotations

from typing import Any

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "logging": ("logging_dir", "tracker_project_name", "tracker_name", "num_validation_images",
                "skip_final_inference", "final_validation_prompt"),
    "about the hub": ("push_to_hub", "hub_token", "hub_model_id", "use_auth_token"),
    "about the machine": (
        "enable_xformers_memory_efficient_attention", "enable_npu_flash_attention", "set_grads_to_none", "cache_dir",
        "local_rank", "offload_ema", "foreach_ema", "dynamo_backend", "gpu_ids", "num_machines", "upcast_before_saving",
        "offload", "prior_generation_precision", "vae_encode_batch_size", "streaming", "enable_vae_tiling",
    ),
    "about files that are written": ("output_kohya_format", "save_as_full_pipeline", "no_safe_serialization",
                                     "save_only_adapter"),
    "the same command resumes": ("resume_from_checkpoint",),
    "the file's number type; weights are read as they are": ("variant",),
    "with task.cache": ("pre_compute_text_embeddings", "cache_latents"),
}  # fmt: skip
"""Why, and the keys."""

LACKING: dict[str, tuple[Any, ...]] = {
    "revision": ("a revision of the hub's model: download it and give its folder, task.base=FOLDER", "main"),
    "non_ema_revision": ("not here",),
    "pretrained_vae_model_name_or_path": (
        "another autoencoder than the base's: not here; write it into a folder with the base",
    ),
    "vae_path": ("another autoencoder than the base's: not here; write it into a folder with the base",),
    "tokenizer_name": ("not here: the base's own",),
    "unet_model_name_or_path": ("not here",),
    "dataset_config_name": ("of a hub's data set",),
    "max_train_samples": ("a part of the pictures: not here; `ldm data build` one of them",),
    "tokenizer_max_length": ("not here: the base's own length",),
    "max_sequence_length": ("not here: the family's own length", 512),
    "text_encoder_use_attention_mask": ("not here",),
    "skip_save_text_encoder": ("not here",),
    "class_labels_conditioning": ("not here",),
    "do_edm_style_training": ("not here: the process is the base's",),
    "validation_scheduler": ("not here; task.samples.settings.sampler", "DPMSolverMultistepScheduler"),
    "dream_training": ("not here",),
    "dream_detail_preservation": ("of DREAM, which is not here", 1.0),
    "timestep_bias_strategy": ("not here", "none"),
    "timestep_bias_multiplier": ("of a bias of times, which is not here", 1.0),
    "timestep_bias_begin": ("of a bias of times, which is not here", 0),
    "timestep_bias_end": ("of a bias of times, which is not here", 1000),
    "timestep_bias_portion": ("of a bias of times, which is not here", 0.25),
    "debug_loss": ("not here",),
    "lora_blocks": ("LoRA of some blocks: not here",),
    "instance_data_root": ("not here",),
    "latent_file": ("not here",),
    "adam_weight_decay_text_encoder": ("another decay for text encoders: not here",),
    "train_transformer_frac": ("not here", 1.0),
    "concepts_list": ("several subjects: one here; `ldm finetune textual-inversion` takes several",),
    "with_prior_preservation_class": ("not here",),
    "token_abstraction": ("pivotal tuning: `ldm finetune dreambooth --pivotal`",),
    "train_text_encoder_ti": ("pivotal tuning: `ldm finetune dreambooth --pivotal`",),
}
"""Why it is refused, then the values that are met all the same."""
