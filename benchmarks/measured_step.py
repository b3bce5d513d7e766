"""One training run of a few steps with random weights, and the memory that it took.

Needs torch, transformers and peft; takes trl's step where trl can be imported, a plain step otherwise.
Nothing of autosft is imported, so that the script runs on any machine with a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

#: Sizes from the config.json of the named models on the Hugging Face hub; weights are random.
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
    "gpt2-medium": {
        "model_type": "gpt2", "vocab_size": 50257, "n_embd": 1024, "n_layer": 24, "n_head": 16,
        "n_positions": 1024, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "max_position_embeddings": 32768,
    },
    "Llama-3.2-1B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "Qwen3-1.7B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": True, "max_position_embeddings": 40960,
    },
    "Llama-3.2-3B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "Mistral-7B-v0.3": {
        "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": False, "max_position_embeddings": 32768, "sliding_window": None,
    },
}  # fmt: skip

#: For the dry run on a CPU: the same two architectures, tiny.
TINY_SHAPES: dict[str, dict[str, Any]] = {
    "tiny-llama": {
        "model_type": "llama", "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 352,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": True, "max_position_embeddings": 2048,
    },
    "tiny-gpt2": {
        "model_type": "gpt2", "vocab_size": 2048, "n_embd": 128, "n_layer": 3, "n_head": 4,
        "n_positions": 1024, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What decides the memory of a run.

    `lengths[i]` are the token lengths of the rows of micro batch i, padded to the longest of them;
    `prompt_share` of each row carries no label.  Every micro batch is followed by an optimizer step unless
    `accumulation` is more than one.
    """

    shape: str
    method: str  # "full" or "lora"
    rank: int | None
    targets: tuple[str, ...] | str | None
    precision: str  # "bf16" (weights and arithmetic) or "bf16-autocast" (fp32 weights)
    optimizer: str  # transformers' name: "adamw_torch" (foreach) or "adamw_torch_fused"
    checkpointing: bool
    accumulation: int
    lengths: tuple[tuple[int, ...], ...]
    prompt_share: float
    step: str  # "trl" or "plain"

    @property
    def batch(self) -> int:
        return len(self.lengths[0])

    @property
    def seq(self) -> int:
        return max(max(rows) for rows in self.lengths)


def config_of(shape: str) -> Any:
    """Return the transformers configuration of a shape."""
    from transformers import AutoConfig

    values = dict((SHAPES | TINY_SHAPES)[shape])
    return AutoConfig.for_model(values.pop("model_type"), **values)


def num_parameters(shape: str) -> int:
    """Return the number of parameters of a shape, counted on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    return sum(parameter.numel() for parameter in model.parameters())


def measure(setting: Setting, *, device: str, cap_bytes: int | None) -> dict[str, Any]:
    """Run a setting in this process, which should be a fresh one, and return what it took.

    `fits` is False where torch ran out of memory.  On CUDA `cap_bytes` limits torch's allocator (the context
    is outside of it); on the CPU it limits the data segment of the process above what it holds at the start.
    """
    started = time.monotonic()
    meter: _Meter = _CudaMeter(cap_bytes) if device == "cuda" else _ResidentMeter(cap_bytes)
    fits, message = True, ""
    try:
        run = _trl_run if setting.step == "trl" else _plain_run
        run(setting, _model_of(setting, device), device, meter)
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        fits, message = False, str(error)[:200]
    return {"fits": fits, "message": message, **meter.result(), "duration_s": time.monotonic() - started}


#: What libraries say in a RuntimeError or an ImportError when an allocation fails: torch's CPU allocator,
#: C++'s standard library, oneDNN (whose scratch memory is part of a primitive), threads, and the loader.
ALLOCATION_FAILURES = (
    "allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "could not create a primitive",
    "could not create a memory object",
    "can't start new thread",
    "failed to map segment",
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or an error that it was raised in handling of, is an allocation that failed."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(seen, OSError) and seen.errno == errno.ENOMEM:
            return True
        if any(words in str(seen) for words in ALLOCATION_FAILURES):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _model_of(setting: Setting, device: str) -> Any:
    """Build the model on the device, parameter by parameter as `.to(device)` would, with harmless values."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config_of(setting.shape), dtype=dtype, attn_implementation="sdpa"
        )
    model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=0.02)
        for buffer in model.buffers():
            buffer.zero_()  # rotation angles: any finite value does
    model.config.use_cache = False
    return model


def _lora(setting: Setting) -> Any:
    from peft import LoraConfig

    targets = setting.targets
    assert targets is not None
    return LoraConfig(
        r=setting.rank or 8,
        lora_alpha=2 * (setting.rank or 8),
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


def _plain_run(setting: Setting, model: Any, device: str, meter: _Meter) -> None:
    """The loop of a plain script: forward with labels, backward, clip, optimizer, zero_grad."""
    if setting.method == "lora":
        from peft import get_peft_model

        model = get_peft_model(model, _lora(setting))
    if setting.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = setting.optimizer == "adamw_torch_fused"
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=fused or None, foreach=not fused)
    model.train()
    meter.start()
    for number, rows in enumerate(setting.lengths, start=1):
        batch = {name: value.to(device) for name, value in _batch(setting, rows).items()}
        with (
            torch.autocast(device, dtype=torch.bfloat16)
            if setting.precision == "bf16-autocast"
            else contextlib.nullcontext()
        ):
            loss = model(**batch, use_cache=False).loss / setting.accumulation
        loss.backward()
        del loss, batch
        if number % setting.accumulation == 0:
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def _batch(setting: Setting, rows: tuple[int, ...]) -> dict[str, torch.Tensor]:
    longest = max(rows)
    ids = torch.ones(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(rows):
        mask[row, :length] = 1
        labels[row, int(length * setting.prompt_share) : length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _trl_run(setting: Setting, model: Any, device: str, meter: _Meter) -> None:
    """trl's SFTTrainer over rows of the given lengths, in the given order."""
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    class Start(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            meter.start()

    disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "a": 1}, unk_token="a")),
        pad_token="<pad>",
        eos_token="<pad>",
    )
    lengths = [length for rows in setting.lengths for length in rows]
    prompts = [int(length * setting.prompt_share) for length in lengths]
    data = Dataset.from_dict(
        {
            "input_ids": [[1] * length for length in lengths],
            "labels": [
                [-100] * prompt + [1] * (length - prompt)
                for length, prompt in zip(lengths, prompts, strict=True)
            ],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=setting.batch,
            gradient_accumulation_steps=setting.accumulation,
            max_steps=len(setting.lengths) // setting.accumulation,
            optim=setting.optimizer,
            learning_rate=1e-5,
            max_grad_norm=1.0,
            bf16=setting.precision == "bf16-autocast",
            activation_checkpointing=setting.checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if setting.checkpointing else None,
            gradient_checkpointing=None,
            train_sampling_strategy="sequential",
            use_cpu=device == "cpu",
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
            peft_config=_lora(setting) if setting.method == "lora" else None,
            callbacks=[Start()],
        )
        trainer.train()


class _Meter:
    """Measures from `start` on."""

    def start(self) -> None:
        raise NotImplementedError

    def result(self) -> dict[str, Any]:
        raise NotImplementedError


class _CudaMeter(_Meter):
    def __init__(self, cap_bytes: int | None) -> None:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.zeros(1, device="cuda")
        self.total_bytes = torch.cuda.get_device_properties(0).total_memory
        fraction = 1.0 if cap_bytes is None else min(1.0, cap_bytes / self.total_bytes)
        torch.cuda.set_per_process_memory_fraction(fraction)
        self.model_bytes = 0
        torch.cuda.empty_cache()

    def start(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        self.model_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def result(self) -> dict[str, Any]:
        stats = torch.cuda.memory_stats()
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        return {
            "model_bytes": self.model_bytes,
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
            "device_used_bytes": total_bytes - free_bytes,  # of all processes on the device
            "reserved_at_end_bytes": torch.cuda.memory_reserved(),
            "num_alloc_retries": stats["num_alloc_retries"],
        }


class _ResidentMeter(_Meter):
    """Resident memory above what the process held when it was forked."""

    def __init__(self, cap_bytes: int | None) -> None:
        self.baseline_bytes = _status_bytes("VmRSS")
        self.model_bytes = 0
        if cap_bytes is not None:
            limit = _status_bytes("VmData") + cap_bytes
            resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))

    def start(self) -> None:
        gc.collect()
        self.model_bytes = max(0, _status_bytes("VmRSS") - self.baseline_bytes)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew

    def result(self) -> dict[str, Any]:
        return {
            "model_bytes": self.model_bytes,
            "peak_resident_bytes": max(0, _status_bytes("VmHWM") - self.baseline_bytes),
        }


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
