"""Measure the processor time of a trained token, beside another build of autosft and trl and peft alone.

    python benchmarks/step_speed.py [--beside PYTHON] [--plain] [--rounds 5] [--cases NAME ...] [--json FILE]
                                    [--precision bf16-autocast]

Every run is a process of its own with one thread: a model of the named shape with random weights trains a few
optimizer steps on random tokens; the second half of each example has labels.  Builds take turns; what
is compared is the median over rounds of the processor time of the steps after the first two, which other
programs on the machine hardly change.  PYTHON is the interpreter of another installation.  --precision is
that of this build alone, the others compute in fp32: bf16-autocast is the default of a study on a CPU that
gains by it (docs/training.md).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str  # a known name, or "small": the demo's size
    method: str
    micro_batch: int
    length: int
    num_steps: int


@dataclass(frozen=True)
class Build:
    """An installation, and how it trains."""

    python: str
    precision: str = "fp32"
    is_plain: bool = False  # trl and peft alone

    def options(self) -> list[str]:
        return ["--precision", self.precision, *(["--plain"] if self.is_plain else [])]


CASES = {
    "SmolLM2-135M LoRA 1x128": Case(
        model="SmolLM2-135M", method="lora", micro_batch=1, length=128, num_steps=5
    ),
    "SmolLM2-135M LoRA 4x128": Case(
        model="SmolLM2-135M", method="lora", micro_batch=4, length=128, num_steps=5
    ),
    "SmolLM2-135M full 1x128": Case(
        model="SmolLM2-135M", method="full", micro_batch=1, length=128, num_steps=5
    ),
    "demo 16x32": Case(model="small", method="full", micro_batch=16, length=32, num_steps=40),
}
SMALL = {
    "vocab_size": 160,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def make_inputs(case: Case, folder: Path) -> None:
    """Write model, tokenizer and data."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from autosft.profiles.model.profile import load_model_profile

    torch.manual_seed(0)
    if case.model == "small":
        config: Any = LlamaConfig(**SMALL, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    else:
        known = json.loads(
            load_model_profile(case.model, need_tokenizer=False, need_weights=False).config_json
        )
        config = AutoConfig.for_model(**known)
        config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, None
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "a": 2}, unk_token="<pad>"))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    made.save_pretrained(folder / "model")
    start = case.length // 2
    for split, number in (("train", case.micro_batch * case.num_steps), ("eval", 1), ("final", 1)):
        ids = torch.randint(2, config.vocab_size, (number, case.length)).tolist()
        rows = [
            {
                "input_ids": row,
                "labels": [-100] * start + row[start:],
                "length": len(row),
                "first_label": start,
            }
            for row in ids
        ]
        Dataset.from_list(rows).save_to_disk(str(folder / "data" / split))


def clock() -> Any:
    """Return a callback that notes the processor time where warm-up ends, and at the end."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = ended = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM_UP_STEPS:
                self.began = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.ended = time.process_time()

    return Clock()


def run_autosft(case: Case, folder: Path, output: Path, precision: str) -> float:
    from unittest import mock

    from datasets import load_from_disk

    from autosft.profiles.dataset.prepared import eval_fingerprint
    from autosft.profiles.recipe import (
        AdapterSettings,
        ByteRange,
        Checkpointing,
        MemoryEstimate,
        Method,
        Precision,
        Sharding,
    )
    from autosft.studies.search.space import default_space
    from autosft.studies.trial import ExecutionPlan, PinnedSettings, TrainingSettings, TrialJob
    from autosft.workers.training import train as training

    method = Method(case.method)
    number = case.micro_batch * case.num_steps
    space = default_space(
        method=method,
        num_parameters=10**8,
        num_train_examples=number,
        seq_lens=[case.length],
        effective_batch_sizes=[case.micro_batch],
    )
    adapter = AdapterSettings(rank=16, alpha=32.0, targets="all-linear") if method is Method.LORA else None
    settings = TrainingSettings(
        learning_rate=1e-4,
        lr_scheduler="cosine",
        warmup_ratio=0.1,
        weight_decay=0.01,
        effective_batch_size=case.micro_batch,
        seq_len=case.length,
        method=method,
        optimizer=str(space["optimizer"].start()),
        adapter=adapter,
        num_train_examples=number,
        max_grad_norm=1.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        seed=0,
    )
    data = folder / "data"
    pinned = PinnedSettings(
        precision=Precision(precision),
        tf32=False,
        attention="sdpa",
        eval_seq_len=case.length,
        eval_micro_batch=1,
        eval_fingerprint=eval_fingerprint(load_from_disk(str(data / "eval")), case.length),
        num_evaluations=1,
    )
    nothing = ByteRange(median_bytes=0, upper_bytes=0)
    estimate = MemoryEstimate(
        allocated=nothing,
        need=nothing,
        uncapped=nothing,
        outside_bytes=0,
        components=(),
        peak_phase="forward",
        peak_owner="",
        method="",
        bound_level=0.9,
        num_calibration_rows=0,
        untraced=(),
    )
    plan = ExecutionPlan(
        device_name="CPU",
        micro_batch=case.micro_batch,
        gradient_accumulation=1,
        data_parallel=1,
        checkpointing=Checkpointing.OFF,
        sharding=Sharding.NONE,
        num_threads=1,
        memory_cap_bytes=1 << 40,
        estimate=estimate,
        predicted_tokens_per_s=1.0,
        predicted_duration_s=1.0,
        reason="",
    )
    job = TrialJob(
        study="speed",
        trial=0,
        attempt=1,
        model=str(folder / "model"),
        data_dir=str(data),
        output_dir=str(output),
        settings=settings,
        pinned=pinned,
        plan=plan,
        device_uuids=("CPU-speed",),
        resume_from=None,
        save_resume_state=False,
        trust_remote_code=False,
    )
    seen, build = clock(), training.build_trainer

    def watched(attempt: Any) -> Any:
        trainer = build(attempt)
        trainer.add_callback(seen)
        return trainer

    with mock.patch.object(training, "build_trainer", watched):
        training.train(job, lambda _: None, lambda: None)
    return float(seen.ended - seen.began)


def run_plain(case: Case, folder: Path, output: Path) -> float:
    """Train as a user of trl and peft would write it."""
    from datasets import load_from_disk
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    seen = clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=SFTConfig(
            output_dir=str(output),
            per_device_train_batch_size=case.micro_batch,
            max_steps=case.num_steps,
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            bf16=False,
            use_cpu=True,
            activation_checkpointing=False,
            save_strategy="no",
            report_to="none",
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            disable_tqdm=True,
        ),
        train_dataset=load_from_disk(str(folder / "data" / "train")).select_columns(["input_ids", "labels"]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=lora if case.method == "lora" else None,
        callbacks=[seen],
    )
    trainer.train()
    return float(seen.ended - seen.began)


def child(case: Case, folder: Path, *, is_plain: bool, precision: str) -> None:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as output:
        if is_plain:
            spent_s = run_plain(case, folder, Path(output))
        else:
            spent_s = run_autosft(case, folder, Path(output), precision)
    num_tokens = (case.num_steps - WARM_UP_STEPS) * case.micro_batch * case.length
    print(json.dumps({"us_per_token": 1e6 * spent_s / num_tokens}))


def one_run(build: Build, name: str, folder: Path) -> float:
    """Return the microseconds of processor time a token of one run."""
    done = subprocess.run(
        [build.python, "-W", "ignore", __file__, "--child", name, str(folder), *build.options()],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
        },
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(json.loads(done.stdout.splitlines()[-1])["us_per_token"])


def measure(builds: dict[str, Build], names: list[str], rounds: int) -> list[dict[str, Any]]:
    """Return a row for each case."""
    rows = []
    for name in names:
        taken: dict[str, list[float]] = {label: [] for label in builds}
        with tempfile.TemporaryDirectory() as folder:
            make_inputs(CASES[name], Path(folder))
            for _ in range(rounds):
                for label, build in builds.items():
                    taken[label].append(one_run(build, name, Path(folder)))
        median = {label: statistics.median(values) for label, values in taken.items()}
        faster = {label: median[label] / median["this"] for label in builds if label != "this"}
        rows.append(
            {
                "case": name,
                **asdict(CASES[name]),
                "us_per_token": median,
                "times_faster": faster,
                "precision": builds["this"].precision,
                "runs": taken,
            }
        )
        print(
            json.dumps({key: rows[-1][key] for key in ("case", "us_per_token", "times_faster")}), flush=True
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--beside", help="the interpreter of another installation")
    parser.add_argument("--plain", action="store_true", help="beside trl and peft alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--precision", choices=("fp32", "bf16-autocast"), default="fp32")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        child(CASES[given.child[0]], Path(given.child[1]), is_plain=given.plain, precision=given.precision)
        return
    builds = {"this": Build(sys.executable, precision=given.precision)}
    if given.beside:
        builds["beside"] = Build(given.beside)
    if given.plain:
        builds["trl and peft"] = Build(sys.executable, is_plain=True)
    rows = measure(builds, given.cases, given.rounds)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
