"""Arguments of sd-scripts that change nothing that is trained here, and those that are not here."""

from __future__ import annotations

from typing import Any

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "logging": (
        "logging_dir", "log_with", "log_prefix", "log_tracker_name", "log_tracker_config", "log_config",
        "wandb_run_name", "wandb_api_key", "console_log_level", "console_log_file", "console_log_simple",
    ),
    "about files that are written": (
        "save_model_as", "save_precision", "save_state", "save_state_on_train_end", "save_last_n_epochs",
        "save_last_n_epochs_state", "save_last_n_steps", "save_last_n_steps_state", "save_n_epoch_ratio",
        "training_comment", "metadata_title", "metadata_author", "metadata_description", "metadata_license",
        "metadata_tags", "no_metadata", "output_config", "config_file", "use_safetensors", "mem_eff_save",
        "huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo", "huggingface_token",
        "huggingface_repo_visibility", "save_state_to_huggingface", "async_upload",
    ),
    "about the machine": (
        "xformers", "mem_eff_attn", "sdpa", "split_attn", "lowram", "highvram", "lowvram",
        "disable_mmap_load_safetensors", "persistent_data_loader_workers", "vae_batch_size",
        "text_encoder_batch_size", "no_half_vae", "torch_compile", "dynamo_backend", "ddp_timeout",
        "ddp_gradient_as_bucket_view", "ddp_static_graph", "tokenizer_cache_dir", "cache_info", "skip_cache_check",
        "cpu_offload_checkpointing", "blockwise_fused_optimizers", "fused_backward_pass",
        "num_machines", "gpu_ids", "num_cpu_threads_per_process", "debug_dataset", "full_path", "zero3_init_flag",
        "zero3_save_16bit_model", "save_t5xxl", "offload_optimizer_nvme_path", "offload_param_nvme_path",
        "max_validation_steps", "validation_seed",
    ),
    "memory alone; train.engine.blocks_on_device does it here": ("blocks_to_swap", "split_mode"),
    "the same command resumes": ("initial_step", "initial_epoch", "skip_until_initial_step"),
}  # fmt: skip
"""Why, and the keys."""

LACKING: dict[str, tuple[Any, ...]] = {
    "v_pred_like_loss": ("not here; task.weighting has min_snr, debiased, snr, p2, ...",),
    "noise_offset_random_strength": ("not here: task.options.offset_noise is of one strength",),
    "ip_noise_gamma_random_strength": ("not here: task.options.input_perturbation is of one strength",),
    "adaptive_noise_scale": ("not here", 0),
    "zero_terminal_snr": ("not here in fine-tuning: the schedule is the base's",),
    "base_weights": ("merging files into the base: `ldm convert` does it",),
    "base_weights_multiplier": ("merging files into the base: `ldm convert` does it",),
    "network_train_text_encoder_only": ("not here: the network trains",),
    "resume": ("its own state of a training: not read here",),
    "vae": ("another autoencoder than the base's: not here; write it into a folder with the base",),
    "clip_skip": ("another layer of the text encoder than the base's: not here", 1),
    "max_token_length": ("captions of several windows: not here in training", 75),
    "t5xxl_max_token_length": ("not here: the family's own length", 512),
    "full_fp16": ("weights that train in half precision: not here; train.engine keeps float32 masters",),
    "full_bf16": ("weights that train in half precision: not here; train.engine keeps float32 masters",),
    "apply_t5_attn_mask": ("not here: the networks of SD3 and FLUX.1 see the padding",),
    "apply_lg_attn_mask": ("not here",),
    "weighted_captions": ("not here in training",),
    "lr_scheduler_type": ("not here",),
    "lr_scheduler_args": ("not here",),
    "stop_text_encoder_training": ("not here: text encoders train throughout or not at all", -1),
    "diffusers_xformers": ("not here",),
    "tokenizer": ("not here: the base's own",),
    "training_shift": ("of flows alone", 1),
    "model_type": ("not here", "flux"),
    "guidance_scale": ("of FLUX.1 alone",),
}
"""Why it is refused, then the values that are met all the same."""
