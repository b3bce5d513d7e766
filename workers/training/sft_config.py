"""Every field of trl's SFTConfig, set explicitly.

trl's and transformers' defaults change between versions (gradient checkpointing and bf16 are on by default
in trl 1.16), and a default that moves is an experiment that changes silently.  Each field is therefore
set here, grouped by what it does; a test compares the names with the installed SFTConfig.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autosft.profiles.recipe import Checkpointing, Precision
from autosft.studies.trial import TrialJob
from autosft.workers.device import device_of

if TYPE_CHECKING:
    from trl import SFTConfig


def sft_config(job: TrialJob, *, num_steps: int, staging_dir: str) -> SFTConfig:
    """Return the complete trainer configuration of an attempt.

    `num_steps` optimizer steps over an already ordered data set; checkpoints are first written below
    `staging_dir` and moved into place when they are whole.
    """
    from trl import SFTConfig

    return SFTConfig(**sft_config_fields(job, num_steps=num_steps, staging_dir=staging_dir))


def sft_config_fields(job: TrialJob, *, num_steps: int, staging_dir: str) -> dict[str, Any]:
    """Return all fields of SFTConfig by name."""
    settings, pinned, plan = job.settings, job.pinned, job.plan
    on_cpu = device_of(job).uses_host_memory
    return {
        # Searched: what changes the loss
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler,
        "lr_scheduler_kwargs": None,
        "warmup_steps": round(settings.warmup_ratio * num_steps),
        "optim": settings.optimizer,
        "optim_args": "bf16_stochastic_round=True" if pinned.precision.rounds_stochastically else None,
        "optim_target_modules": None,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_epsilon": settings.adam_epsilon,
        "max_grad_norm": settings.max_grad_norm,
        "label_smoothing_factor": 0.0,
        "neftune_noise_alpha": None,
        "loss_type": "nll",
        "router_aux_loss_coef": None,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "full_determinism": False,
        # The resource: the data set is laid out in order, each example once, every step full
        "num_train_epochs": 1.0,
        "max_steps": num_steps,
        "train_sampling_strategy": "sequential",
        "length_column_name": "length",
        "shuffle_dataset": False,
        "ignore_data_skip": False,
        # Solved: what only changes memory and speed
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.gradient_accumulation,
        "average_tokens_across_devices": True,
        "activation_checkpointing": plan.checkpointing is not Checkpointing.OFF,
        "activation_checkpointing_kwargs": None
        if plan.checkpointing is Checkpointing.OFF
        else {"use_reentrant": plan.checkpointing is Checkpointing.REENTRANT},
        "gradient_checkpointing": None,  # the deprecated name; trl would default it to True
        "gradient_checkpointing_kwargs": None,
        "activation_offloading": False,
        "auto_find_batch_size": False,  # would silently change the effective batch
        "torch_empty_cache_steps": None,
        "dataloader_drop_last": False,
        "dataloader_num_workers": 0,  # memory-mapped and pre-tokenized: a worker costs more than it gives
        "dataloader_pin_memory": not on_cpu,
        "dataloader_persistent_workers": False,
        "dataloader_prefetch_factor": None,
        "dataloader_multiprocessing_context": None,
        "dataloader_in_order": True,
        "fsdp": None,
        "fsdp_config": None,
        "deepspeed": None,
        "ddp_find_unused_parameters": None,
        "ddp_bucket_cap_mb": None,
        "ddp_broadcast_buffers": None,
        "ddp_static_graph": None,
        "ddp_backend": None,
        "ddp_timeout": 1800,
        "accelerator_config": None,
        "parallelism_config": None,
        "local_rank": -1,
        # Pinned: what changes numerics
        "bf16": pinned.precision is Precision.BF16_AUTOCAST,
        "fp16": pinned.precision.scales_loss,
        "bf16_full_eval": False,
        "fp16_full_eval": False,
        "tf32": None if on_cpu else pinned.tf32,
        "torch_compile": False,
        "torch_compile_backend": None,
        "torch_compile_mode": None,
        "use_liger_kernel": False,
        "liger_kernel_config": None,
        "use_cpu": on_cpu,
        "use_cache": False,
        # Data: tokenized, labelled and ordered before the trial; truncated by our collator
        "max_length": None,
        "truncation_mode": "keep_start",
        "packing": False,  # texts are packed into blocks when the data is prepared
        "packing_strategy": "bfd",
        "padding_free": False,
        "pad_to_multiple_of": None,
        "eval_packing": None,
        "completion_only_loss": False,
        "assistant_only_loss": False,
        "chat_template_path": None,
        "dataset_text_field": "text",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "dataset_num_proc": None,
        "eos_token": None,
        "pad_token": None,
        "remove_unused_columns": True,
        "label_names": None,
        # Evaluation and checkpoints happen when our callback says so, not on trl's schedule
        "eval_strategy": "no",
        "eval_steps": None,
        "eval_delay": 0,
        "eval_on_start": False,
        "eval_do_concat_batches": True,
        "eval_use_gather_object": False,
        "eval_accumulation_steps": None,
        "per_device_eval_batch_size": pinned.eval_micro_batch,
        "prediction_loss_only": True,
        "include_for_metrics": [],
        "batch_eval_metrics": False,
        "output_dir": staging_dir,
        "save_strategy": "no",
        "save_steps": 500,
        "save_total_limit": None,
        "save_only_model": not job.save_resume_state,
        "save_on_each_node": False,
        "enable_jit_checkpoint": False,
        "load_best_model_at_end": False,
        "metric_for_best_model": None,
        "greater_is_better": None,
        "resume_from_checkpoint": None,  # given to train()
        "restore_callback_states_from_checkpoint": False,
        # Reports go through our callback; the terminal stays quiet
        "logging_strategy": "steps",
        "logging_steps": max(1, num_steps // 100),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a NaN must be seen, not averaged away
        "log_level": "warning",
        "log_level_replica": "warning",
        "log_on_each_node": False,
        "disable_tqdm": True,
        "report_to": list(job.report_to) or "none",
        "run_name": f"{job.study} trial {job.trial}" if job.report_to else None,
        "project": "huggingface",
        "trackio_space_id": None,
        "trackio_bucket_id": None,
        "trackio_static_space_id": None,
        "include_num_input_tokens_seen": "no",
        "skip_memory_metrics": True,
        "debug": "",
        # Nothing leaves the machine
        "push_to_hub": False,
        "hub_model_id": None,
        "hub_token": None,
        "hub_private_repo": None,
        "hub_strategy": "every_save",
        "hub_always_push": False,
        "hub_revision": None,
        # The model is built by us, before the trainer
        "model_init_kwargs": None,
        "trust_remote_code": job.trust_remote_code,
        # The trainer is driven by train() alone
        "do_train": True,
        "do_eval": False,
        "do_predict": False,
    }
