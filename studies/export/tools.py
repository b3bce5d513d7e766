"""A configuration in the formats of trl, transformers, axolotl and LLaMA-Factory.  Pure functions.

Every tool gets the examples of the entire run, tokenized and in order (`data/`), so that an optimizer step
does not depend on how a tool renders chats, masks prompts or shuffles.  Names were checked against trl 1.16,
transformers 5.23, axolotl 0.19 and LLaMA-Factory 0.9.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autosft.profiles.model.adapters import KINDS, peft_fields
from autosft.profiles.recipe import AdapterSettings, Checkpointing, Method, Precision
from autosft.profiles.units import gib
from autosft.studies.export.config import ExportedConfig
from autosft.studies.formatting import format_metric
from autosft.studies.trial import ExecutionPlan

Fields = dict[str, Any]

#: How transformers passes on to torchao's optimizers that bf16 weights are rounded at random.
STOCHASTIC = "bf16_stochastic_round=True"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A configuration and what follows from it and its data."""

    config: ExportedConfig
    plan: ExecutionPlan
    num_steps: int  # optimizer steps
    on_cpu: bool
    own_template: bool  # the tokenizer in `tokenizer/` has a chat template that the model's own lacks
    turn_end: tuple[int, ...] = ()  # tokens that end an assistant's turn
    trust_remote_code: bool = False

    @property
    def eval_every(self) -> int:
        """Return the number of optimizer steps between two evaluations."""
        return math.ceil(self.num_steps / self.config.pinned.num_evaluations)

    @property
    def warmup_steps(self) -> int:
        return round(self.config.settings.warmup_ratio * self.num_steps)


def is_cpu_plan(config: ExportedConfig) -> bool:
    """Whether a configuration was planned for CPU cores, according to its environment."""
    hardware = config.environment.get("hardware") if isinstance(config.environment, Mapping) else None
    devices = (hardware or {}).get("devices", ())
    name = config.plan.device_name if config.plan else None
    return any(device.get("kind") == "cpu" and device.get("name") == name for device in devices)


def facts(run: Run) -> list[str]:
    """Return the origin and measurements of a configuration as lines: the head of every exported file."""
    config, plan = run.config, run.plan
    environment = config.environment if isinstance(config.environment, Mapping) else {}
    packages = environment.get("packages") or {}
    expected = config.expected
    at = "" if expected.step is None else f" at step {expected.step} of {run.num_steps}"
    estimate = plan.estimate
    lines = [
        f"Study {config.study!r}, trial {config.trial}; exported by autosft {config.autosft}.",
        f"Measured: {expected.metric} {format_metric(expected.value)}{at}.",
        f"Model: {config.model.name} (fingerprint {config.model.fingerprint}).",
        f"Data: {config.data.source} (fingerprint {config.data.fingerprint}).",
        f"Planned for {plan.device_name}: {plan.micro_batch} x {plan.gradient_accumulation} accumulated x "
        f"{plan.data_parallel} devices = {config.settings.effective_batch_size} examples per step.",
    ]
    if not plan.measures_itself:
        lines.append(
            f"Predicted memory: {gib(estimate.need.median_bytes + estimate.outside_bytes)} per device, "
            f"at most {gib(estimate.total_bytes)}."
        )
    if expected.peak_allocated_bytes:
        lines.append(f"Measured memory: {gib(expected.peak_allocated_bytes)} allocated.")
    if packages:
        lines.append(
            "Versions: " + ", ".join(f"{name} {version}" for name, version in packages.items()) + "."
        )
    return [one_line(line) for line in lines]


def one_line(text: str) -> str:
    """Return text as one line without control characters.

    A fact stands behind a comment's mark, and what it says may be anybody's: a name with a line end in it
    would put a line of its own into a script.
    """
    spaced = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(spaced.split())


def differences(run: Run) -> list[str]:
    """Return what any other tool does differently from the study, as lines."""
    pinned = run.config.pinned
    lines = []
    if pinned.precision.rounds_stochastically:
        lines.append(
            "The study rounded its bf16 weights by random numbers of their own for each step; here they are "
            "drawn from torch's global generator: the same on average, not bit for bit. It needs torchao."
        )
    if not pinned.padding_free:
        return lines
    return [
        *lines,
        "The study trained without padding, the examples of a micro batch in one row. Here they are padded: "
        "the same losses up to rounding, with more memory than predicted. If flash-attn is installed, trl "
        "can train without padding too: padding_free: true and attn_implementation: flash_attention_2.",
    ]


def trainer_fields(run: Run) -> Fields:
    """Return the fields of transformers' TrainingArguments that determine the run."""
    settings, pinned, plan = run.config.settings, run.config.pinned, run.plan
    return {
        # These change the loss
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler,
        "warmup_steps": run.warmup_steps,
        "optim": settings.optimizer,
        **({"optim_args": STOCHASTIC} if pinned.precision.rounds_stochastically else {}),
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_epsilon": settings.adam_epsilon,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "data_seed": settings.seed,
        # The data holds the entire run in order
        "num_train_epochs": 1.0,
        "max_steps": run.num_steps,
        "train_sampling_strategy": "sequential",
        # These only change memory and speed
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.gradient_accumulation,
        "per_device_eval_batch_size": pinned.eval_micro_batch,
        "average_tokens_across_devices": True,
        "activation_checkpointing": plan.checkpointing is not Checkpointing.OFF,
        "dataloader_num_workers": 0,
        # Numerics
        "bf16": pinned.precision is Precision.BF16_AUTOCAST,
        "fp16": pinned.precision.scales_loss,
        **({"use_cpu": True} if run.on_cpu else {"tf32": pinned.tf32}),
        # Logging, evaluation, saving
        "eval_strategy": "steps",
        "eval_steps": run.eval_every,
        "save_strategy": "steps",
        "save_steps": run.eval_every,
        "save_total_limit": 2,
        "logging_steps": max(1, run.num_steps // 100),
        "logging_first_step": True,
        "report_to": "none",
    }


def sft_fields(run: Run) -> Fields:
    """Return the fields of trl's SFTConfig: those of transformers, and that the data is already prepared."""
    checkpointing = run.plan.checkpointing
    fields = trainer_fields(run)
    if checkpointing is not Checkpointing.OFF:
        fields["activation_checkpointing_kwargs"] = {
            "use_reentrant": checkpointing is Checkpointing.REENTRANT
        }
    return {
        **fields,
        "loss_type": "nll",
        "max_length": None,  # truncated already
        "packing": False,
        "shuffle_dataset": False,
        "completion_only_loss": False,  # the labels decide what is scored
        "assistant_only_loss": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def trl_fields(run: Run) -> Fields:
    """Return the fields of `trl sft --config`: script, training and model arguments in one."""
    config = run.config
    adapter = config.settings.adapter
    fields: Fields = {
        "model_name_or_path": config.model.name,
        **({"trust_remote_code": True} if run.trust_remote_code else {}),
        "dtype": config.pinned.precision.weight_dtype,
        "attn_implementation": config.pinned.attention,
        "dataset_name": "data",
        "dataset_train_split": "train",
        "dataset_test_split": "test",
        "output_dir": "output",
        **sft_fields(run),
    }
    if run.own_template:
        fields["chat_template_path"] = "tokenizer/chat_template.jinja"
    if adapter is not None:
        targets = [adapter.targets] if isinstance(adapter.targets, str) else list(adapter.targets)
        fields |= {
            "use_peft": True,
            "lora_r": adapter.rank,
            "lora_alpha": _integer(adapter.alpha),
            "lora_dropout": adapter.dropout,
            "lora_target_modules": targets,
            "use_rslora": adapter.use_rslora,
            "use_dora": adapter.use_dora,
        }
    if config.settings.method is Method.QLORA:
        fields |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
    return fields


def axolotl_fields(run: Run) -> Fields:
    """Return the fields of `axolotl train`, checked against its AxolotlInputConfig."""
    config, plan = run.config, run.plan
    settings, pinned, adapter = config.settings, config.pinned, config.settings.adapter
    fields: Fields = {
        "base_model": config.model.name,
        "tokenizer_config": "tokenizer",
        # input_ids, attention_mask and labels: used unchanged
        "datasets": [{"path": "data/train.parquet", "ds_type": "parquet", "type": None}],
        "test_datasets": [
            {"path": "data/test.parquet", "ds_type": "parquet", "split": "train", "type": None}
        ],
        "dataset_prepared_path": "output/prepared",
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,  # keeps the order of the data
        "sequence_len": max(settings.seq_len, pinned.eval_seq_len),
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "output_dir": "output",
        "micro_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.gradient_accumulation,
        "eval_batch_size": pinned.eval_micro_batch,
        "num_epochs": 1,
        "max_steps": run.num_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler": settings.lr_scheduler,
        "warmup_steps": run.warmup_steps,
        "optimizer": settings.optimizer,
        **({"optim_args": STOCHASTIC} if pinned.precision.rounds_stochastically else {}),
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_epsilon": settings.adam_epsilon,
        "max_grad_norm": settings.max_grad_norm,
        "seed": settings.seed,
        "gradient_checkpointing": plan.checkpointing is not Checkpointing.OFF,
        "bf16": "full" if pinned.precision.has_bf16_weights else pinned.precision is Precision.BF16_AUTOCAST,
        "fp16": pinned.precision.scales_loss,
        "tf32": pinned.tf32,
        "attn_implementation": pinned.attention,
        "eval_steps": run.eval_every,
        "save_steps": run.eval_every,
        "logging_steps": max(1, run.num_steps // 100),
        "trust_remote_code": run.trust_remote_code,
    }
    if plan.checkpointing is not Checkpointing.OFF:
        reentrant = plan.checkpointing is Checkpointing.REENTRANT
        fields["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    if adapter is not None:
        fields |= {
            "adapter": "qlora" if settings.method is Method.QLORA else "lora",
            "load_in_4bit": settings.method is Method.QLORA,
            "lora_r": adapter.rank,
            "lora_alpha": _integer(adapter.alpha),
            "lora_dropout": adapter.dropout,
            "peft_use_rslora": adapter.use_rslora,
            "peft_use_dora": adapter.use_dora,
        }
        if adapter.targets == "all-linear":
            fields["lora_target_linear"] = True
        else:
            fields["lora_target_modules"] = (
                [adapter.targets] if isinstance(adapter.targets, str) else list(adapter.targets)
            )
    return fields


def axolotl_differences(run: Run) -> list[str]:
    """Return what axolotl does differently from the study, as lines."""
    said = []
    if run.config.pinned.precision in (Precision.BF16_AUTOCAST, Precision.FP16_AUTOCAST):
        said.append(
            "axolotl keeps weights in 16 bits under bf16/fp16, whereas the study trained fp32 weights under "
            "autocast: small updates can be lost, and the loss curve will differ."
        )
    return said


def llamafactory_fields(run: Run) -> Fields:
    """Return the fields of `llamafactory-cli train`, checked against its get_train_args."""
    config, plan = run.config, run.plan
    settings, pinned, adapter = config.settings, config.pinned, config.settings.adapter
    trainer = trainer_fields(run)
    renamed = ("train_sampling_strategy", "activation_checkpointing", "num_train_epochs")
    fields: Fields = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": config.model.name,
        **({"trust_remote_code": True} if run.trust_remote_code else {}),
        "template": "empty",  # the data is tokenized: no chat is rendered
        "dataset": "tokenized",  # both are required, and not read if tokenized_path exists
        "eval_dataset": "tokenized",
        "tokenized_path": "data/tokenized",
        "cutoff_len": max(settings.seq_len, pinned.eval_seq_len),
        "disable_shuffling": True,  # keeps the order of the data
        "packing": False,
        "finetuning_type": "full" if adapter is None else "lora",
        "flash_attn": "sdpa" if pinned.attention == "sdpa" else "disabled",
        "disable_gradient_checkpointing": plan.checkpointing is Checkpointing.OFF,
        "use_reentrant_gc": plan.checkpointing is Checkpointing.REENTRANT,
        "output_dir": "output",
        **{name: value for name, value in trainer.items() if name not in renamed},
    }
    if pinned.precision.has_bf16_weights:
        fields |= {"bf16": True, "pure_bf16": True}
    if adapter is not None:
        targets = "all" if adapter.targets == "all-linear" else adapter.targets
        fields |= {
            "lora_rank": adapter.rank,
            "lora_alpha": _integer(adapter.alpha),
            "lora_dropout": adapter.dropout,
            "lora_target": targets if isinstance(targets, str) else ",".join(targets),
            "use_rslora": adapter.use_rslora,
            "use_dora": adapter.use_dora,
        }
    if settings.method is Method.QLORA:
        fields |= {"quantization_bit": 4, "quantization_method": "bnb", "double_quantization": True}
    return fields


def lora_arguments(run: Run) -> Fields | None:
    """Return the arguments of peft's LoraConfig, None for full fine-tuning.

    For other adapters, with the peft type, as peft's get_peft_config expects them.
    """
    adapter = run.config.settings.adapter
    if adapter is None:
        return None
    fields = peft_fields(adapter)
    return fields if adapter.kind == "lora" else {"peft_type": KINDS[adapter.kind].peft_type, **fields}


def has_config_fields(adapter: AdapterSettings | None) -> bool:
    """Whether the tools' configurations can express an adapter: plain LoRA, or no adapter at all."""
    return adapter is None or (adapter.kind == "lora" and not adapter.options)


def _integer(value: float) -> float | int:
    return int(value) if value == int(value) else value
