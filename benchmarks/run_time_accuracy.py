"""Compare the predicted time of whole trials with the time that they take, on this machine's CPU.

    python benchmarks/run_time_accuracy.py [--clock wall] [--only 0 3] [--json OUT.jsonl]
    python benchmarks/run_time_accuracy.py --from benchmarks/data/run_times_cpu.jsonl

Small trials of unlike settings run through the product's own training, evaluations, checkpoints and answers
included.  Two predictions of the whole are held against what was measured: the one before the start (cold,
from measured rates of this CPU) and the one that the trial itself gives after 20 optimizer steps, before most
of its evaluations.  `--clock cpu`, the default, counts the process's own CPU seconds, so that other programs
on the machine do not count; `--clock wall` is what a user waits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from unpredicted import unpredicted_memory

from autosft.workers.processes.starters import SERVER_ENVIRONMENT

#: Reports from this step on may be the one that is judged.
NUM_MEASURED_STEPS = 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One trial: a Llama of random weights, examples of log-normal length, and how they are run."""

    name: str
    hidden: int = 128
    num_layers: int = 4
    vocab: int = 2000
    lora_rank: int | None = None
    mean_tokens: int = 60
    seq_len: int = 128
    micro_batch: int = 8
    accumulation: int = 1
    num_steps: int = 80
    num_evaluations: int = 4
    num_eval_examples: int = 64
    num_prompts: int = 0
    is_checkpointed: bool = False
    optimizer: str = "adamw_torch_fused"


SETTINGS = (
    Setting(name="full"),
    Setting(name="wider", hidden=320, num_layers=6, micro_batch=4, num_steps=60),
    Setting(name="LoRA", hidden=192, num_layers=6, lora_rank=8, micro_batch=4),
    Setting(name="accumulated, one at a time", micro_batch=1, accumulation=8, num_steps=60),
    Setting(name="checkpointing", hidden=256, is_checkpointed=True),
    Setting(name="long", mean_tokens=300, seq_len=768, micro_batch=2, num_eval_examples=24),
    Setting(name="large vocabulary", hidden=64, vocab=16_000, micro_batch=4),
    Setting(name="many evaluations", num_evaluations=16, num_eval_examples=128),
    Setting(name="answers", num_prompts=48, num_evaluations=3),
    Setting(name="LoRA with answers", hidden=192, lora_rank=16, num_prompts=24, num_evaluations=2),
    Setting(name="foreach AdamW, accumulated", hidden=192, micro_batch=4, accumulation=4, num_steps=50,
            optimizer="adamw_torch"),
    Setting(name="tiny batches", micro_batch=2, num_steps=240, mean_tokens=40),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Seconds of one trial, from its first optimizer step to its end."""

    name: str
    clock: str
    num_steps: int
    at_step: int  # when the warm prediction was given
    num_evaluated: int  # evaluations that were over by then
    num_evaluations: int
    cold_s: float
    predicted_s: float  # spent until then, and the rest as predicted then
    measured_s: float
    load_average: float  # of the machine, at the end

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1

    @property
    def cold_error(self) -> float:
        return self.cold_s / self.measured_s - 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the trials to run")
    parser.add_argument("--json", type=Path, help="append the outcomes as JSON lines")
    parser.add_argument("--from", dest="source", type=Path, help="only report what such a file holds")
    arguments = parser.parse_args()
    os.environ.update(SERVER_ENVIRONMENT)  # of the processes that trials run in
    if arguments.source:
        lines = arguments.source.read_text(encoding="utf-8").splitlines()
        outcomes = [Outcome(**json.loads(line)) for line in lines if line.strip()]
    else:
        numbers = range(len(SETTINGS)) if arguments.only is None else arguments.only
        outcomes = []
        for setting in (SETTINGS[number] for number in numbers):
            # A fresh interpreter each: the first steps in a process are the slow ones.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                outcome = pool.submit(run, setting, arguments.clock).result()
            print(line_of(outcome), flush=True)
            outcomes.append(outcome)
            if arguments.json:
                with arguments.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(outcome)) + "\n")
    report(outcomes)


def run(setting: Setting, clock: str) -> Outcome:
    """Train one trial in this process and return what was predicted and what it took."""
    import torch

    from autosft.workers.training import train, trial_callback

    torch.set_num_threads(1)
    if clock == "cpu":
        trial_callback.time = SimpleNamespace(monotonic=time.process_time)  # type: ignore[assignment]
    seen: list[Any] = []
    with tempfile.TemporaryDirectory() as name:
        job = make_job(setting, Path(name))
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # the trainer prints its losses
            end = train.train(job, report=seen.append, stop_requested=lambda: None)
    assert end.completed, end.message
    judged = next(item for item in seen if item.step >= NUM_MEASURED_STEPS)
    assert judged.remaining_s is not None
    expected = job.plan.run_time
    assert expected is not None
    return Outcome(
        name=setting.name,
        clock=clock,
        num_steps=judged.num_steps,
        at_step=judged.step,
        num_evaluated=sum(item.is_evaluation for item in seen[: seen.index(judged) + 1]),
        num_evaluations=setting.num_evaluations,
        cold_s=expected.total_s - expected.start_s,
        predicted_s=judged.elapsed_s + judged.remaining_s,
        measured_s=seen[-1].elapsed_s,
        load_average=os.getloadavg()[0],
    )


def make_job(setting: Setting, folder: Path) -> Any:
    """Write model and data, and return the trial with the run time that a study would predict for it."""
    from autosft.profiles.dataset.prepared import eval_fingerprint
    from autosft.profiles.hardware.benchmark import with_measured_rates
    from autosft.profiles.hardware.discover import profile_hardware
    from autosft.profiles.model.profile import load_model_profile
    from autosft.profiles.recipe import (
        AdapterSettings,
        Checkpointing,
        Method,
        Precision,
        Sharding,
    )
    from autosft.scheduler.decide.cost_models import Answers, Models
    from autosft.scheduler.decide.planner import recipe_for
    from autosft.studies.trial import (
        ExecutionPlan,
        PinnedSettings,
        PromptScoring,
        TrainingSettings,
        TrialJob,
    )

    write_model(setting, folder / "model")
    data = write_data(setting, folder / "data")
    lora = None
    if setting.lora_rank is not None:
        lora = AdapterSettings(rank=setting.lora_rank, alpha=16.0, targets="all-linear")
    effective = setting.micro_batch * setting.accumulation
    settings = TrainingSettings(
        learning_rate=1e-4,
        lr_scheduler="cosine",
        warmup_ratio=0.1,
        weight_decay=0.0,
        effective_batch_size=effective,
        seq_len=setting.seq_len,
        method=Method.FULL if lora is None else Method.LORA,
        optimizer=setting.optimizer,
        adapter=lora,
        num_train_examples=setting.num_steps * effective,
        max_grad_norm=1.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        seed=0,
    )
    pinned = PinnedSettings(
        precision=Precision.FP32,
        tf32=False,
        attention="sdpa",
        eval_seq_len=setting.seq_len,
        eval_micro_batch=min(16, setting.micro_batch),
        eval_fingerprint=eval_fingerprint(data["eval"], setting.seq_len),
        num_evaluations=setting.num_evaluations,
    )
    lengths = {split: length_profile(data[split], setting.seq_len) for split in ("train", "eval")}
    answers = scoring = None
    if setting.num_prompts:
        answers = Answers(num_prompts=setting.num_prompts, mean_prompt_tokens=20.0, max_new_tokens=48)
        scoring = PromptScoring(prompts=str(write_prompts(setting, folder)), max_new_tokens=48)
    models = Models(
        load_model_profile(str(folder / "model")),
        lambda _, __: lengths["train"],
        eval_lengths=lambda _: lengths["eval"],
        num_evaluations=setting.num_evaluations,
        answers=answers,
    )
    checkpointing = Checkpointing.NON_REENTRANT if setting.is_checkpointed else Checkpointing.OFF
    recipe = recipe_for(settings, pinned, checkpointing, setting.accumulation)
    device = with_measured_rates(profile_hardware("cpu")).devices[0]
    speed = models.speed(recipe, setting.micro_batch, settings, device, 1)
    plan = ExecutionPlan(
        device_name=device.name,
        micro_batch=setting.micro_batch,
        gradient_accumulation=setting.accumulation,
        data_parallel=1,
        checkpointing=checkpointing,
        sharding=Sharding.NONE,
        num_threads=1,
        memory_cap_bytes=8 * GIB,
        estimate=unpredicted_memory(upper_bytes=8 * GIB),
        predicted_tokens_per_s=speed.tokens_per_s,
        predicted_duration_s=speed.run_s,
        reason="",
        run_time=speed.run_time,
    )
    return TrialJob(
        study="run times",
        trial=0,
        attempt=1,
        model=str(folder / "model"),
        data_dir=str(folder / "data"),
        output_dir=str(folder / "trial"),
        settings=settings,
        pinned=pinned,
        plan=plan,
        device_uuids=("CPU-0",),
        resume_from=None,
        save_resume_state=True,
        trust_remote_code=False,
        scoring=scoring,
    )


def write_model(setting: Setting, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=setting.vocab,
        hidden_size=setting.hidden,
        intermediate_size=3 * setting.hidden,
        num_hidden_layers=setting.num_layers,
        num_attention_heads=setting.hidden // 32,
        num_key_value_heads=setting.hidden // 64,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, setting.vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)


def write_data(setting: Setting, folder: Path) -> dict[str, Any]:
    """Write examples of random words; the first quarter of each is not learned."""
    import numpy as np
    from datasets import Dataset

    generator = np.random.default_rng(0)
    sigma = 0.6
    written = {}
    for split, count in (("train", 400), ("eval", setting.num_eval_examples)):
        drawn = generator.lognormal(math.log(setting.mean_tokens) - sigma**2 / 2, sigma, count)
        rows = []
        for length in np.clip(drawn.round().astype(int), 8, setting.seq_len).tolist():
            ids = generator.integers(2, setting.vocab, length).tolist()
            unlearned = length // 4
            rows.append(
                {
                    "input_ids": ids,
                    "labels": [-100] * unlearned + ids[unlearned:],
                    "length": length,
                    "first_label": unlearned,
                }
            )
        written[split] = Dataset.from_list(rows)
        written[split].save_to_disk(str(folder / split))
    return written


def length_profile(dataset: Any, seq_len: int) -> Any:
    from autosft.profiles.recipe import LengthProfile

    lengths = tuple(min(item, seq_len) for item in dataset["length"])
    return LengthProfile(
        lengths=lengths, scored=tuple(length - length // 4 for length in lengths), max_length=max(lengths)
    )


def write_prompts(setting: Setting, folder: Path) -> Path:
    from autosft.profiles.dataset import ifeval_prompts

    path = folder / "prompts.jsonl"
    prompts = [
        ifeval_prompts.Prompt(
            key=number,
            prompt=" ".join(f"w{2 + (7 * number + k) % 400}" for k in range(20)),
            instructions=("punctuation:no_comma",),
            arguments=({},),
        )
        for number in range(setting.num_prompts)
    ]
    ifeval_prompts.write_prompts(path, prompts)
    return path


def line_of(one: Outcome) -> str:
    return (
        f"  {one.name:28} {one.clock:4} {one.num_steps:4} steps, {one.num_evaluations:2} evaluations  "
        f"measured {one.measured_s:6.1f} s  cold {one.cold_error:+7.1%}  after {one.at_step} steps "
        f"(with {one.num_evaluated} evaluations) {one.error:+6.1%}  load {one.load_average:.1f}"
    )


def report(outcomes: Sequence[Outcome]) -> None:
    for clock in dict.fromkeys(outcome.clock for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.clock == clock]
        print(f"{clock} clock")
        for item in mine:
            print(line_of(item))
        for title, errors in (
            ("cold", [abs(item.cold_error) for item in mine]),
            (f"after {NUM_MEASURED_STEPS} steps", [abs(item.error) for item in mine]),
        ):
            ordered = sorted(errors)
            ninetieth = ordered[math.ceil(0.9 * len(ordered)) - 1]
            print(
                f"  {title}: {len(ordered)} trials, median {statistics.median(ordered):.1%}, "
                f"90th percentile {ninetieth:.1%}, worst {ordered[-1]:.1%}"
            )


if __name__ == "__main__":
    main()
