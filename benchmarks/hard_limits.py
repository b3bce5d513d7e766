"""Run random requests through `autosft tune`, each under a hard memory limit, and see which die.

    python benchmarks/hard_limits.py --data FOLDER --out limits.jsonl [--num 40] [--shares 1.0 0.9]

Every request is a small random model (Llama, Qwen3 or GPT-NeoX shape; full fine-tuning or LoRA), real data
(FOLDER holds alpaca_en_demo.json, glaive_toolcall_en_demo.json and wikitext2_valid.txt) and a machine with
a random amount of free memory, so that the planner chooses among micro batches and checkpointing.  With the
share 1 the limit is the plan's own: the upper bound of its prediction, and nobody should die.  With another
share it is that share of the predicted median: at 0.9 nearly everybody should.  The study runs under the
first share; under the others the same trial is run again, by the same runner.

On the CPU the limit is put where autosft puts it (`workers.attempt.limit_data_segment`), but without the
room that it leaves above the bound.
With --padding-free the same requests train without padding, into a file of their own.
Needs no GPU; a request takes about twenty seconds on an idle core, a further share of it six.  One JSON
object a line; lines that are there already are not run again, so that a run cut off by --time-budget goes on
when it is started again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from autosft.profiles.errors import StudyFailedError
from autosft.profiles.hardware.discover import profile_hardware, save_profile
from autosft.scheduler.events import StudyEvent
from autosft.scheduler.loop.tuning import run_study
from autosft.scheduler.plan.remedies import TooLittleMemoryError
from autosft.scheduler.setup.open_study import open_study
from autosft.studies.request import TuneRequest
from autosft.studies.trial import AttemptEnd, FailureKind, StopReason, TrialEvent, TrialJob
from autosft.workers.processes.memory_limit import ROOM_BYTES
from autosft.workers.runner import TrialRunner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "qwen3", "gpt_neox")
DATA = ("alpaca_en_demo.json", "glaive_toolcall_en_demo.json", "wikitext2_valid.txt")
NUM_STEPS = 2  # the second has optimizer state, and the worst batch is rehearsed between them
NUM_EVAL = 4
VOCABULARY = 3_000  # entries of the tokenizer; models have more rows than that
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One random request."""

    number: int
    architecture: str
    hidden: int
    num_layers: int
    vocab_size: int
    method: str
    data: str
    seq_len: int
    effective_batch_size: int
    free_mib: int
    padding_free: bool = False
    precision: str = "auto"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the real data")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, gone on with")
    parser.add_argument("--num", type=int, default=40, help="requests")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1.0, 0.9], help="1: the bound; others: of the median"
    )
    parser.add_argument("--time-budget", type=float, default=1e9, help="seconds")
    parser.add_argument("--padding-free", action="store_true", help="micro batches as rows of examples")
    parser.add_argument("--precision", default="auto", help="as of `autosft tune`")
    parser.add_argument("--only", type=int, nargs="+", help="these requests alone")
    options = parser.parse_args()
    deadline = time.monotonic() + options.time_budget
    done = read_rows(options.out)
    with ProcessPoolExecutor(1, get_context("spawn")) as maker:
        for number in options.only or range(options.num):
            left = [share for share in options.shares if (number, share) not in done]
            if not left or time.monotonic() > deadline:
                continue
            drawn = replace(draw(number), padding_free=options.padding_free, precision=options.precision)
            for row in run_where_it_fits(drawn, options.data, left, maker):
                done[number, row["share"]] = row
                with options.out.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")
                print(in_words(row), flush=True)
    for share in options.shares:
        report([done[key] for key in sorted(done) if key[1] == share], share, options.num)
    return 0


def read_rows(path: Path) -> dict[tuple[int, float], dict[str, Any]]:
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for row in rows:
        row["request"].setdefault("precision", "auto")  # rows from before it could be asked for
    return {(row["request"]["number"], row["share"]): row for row in rows}


def draw(number: int) -> Drawn:
    """Return request `number`, always the same one."""
    chosen = random.Random(number)
    data = chosen.choice(DATA)
    # An answer of the conversations with tools begins after a hundred tokens.
    lengths = (256, 320, 384) if data.startswith("glaive") else (64, 96, 128, 192, 256, 384)
    return Drawn(
        number=number,
        architecture=chosen.choice(ARCHITECTURES),
        hidden=chosen.choice((192, 256, 320, 384, 512, 640)),
        num_layers=chosen.randint(2, 8),
        vocab_size=chosen.choice((4_096, 8_192, 16_384, 32_000)),
        method=chosen.choice(("full", "lora")),
        data=data,
        seq_len=chosen.choice(lengths),
        effective_batch_size=chosen.choice((2, 4, 6, 8)),
        free_mib=round(2 ** chosen.uniform(9.5, 11.5)),
    )


def run_where_it_fits(
    drawn: Drawn, data: Path, shares: Sequence[float], maker: Executor
) -> Iterator[dict[str, Any]]:
    """Run one request on the machine that was drawn, or with twice its memory, and so on, until it fits."""
    while True:
        try:
            yield from run_request(drawn, data, shares, maker)
        except TooLittleMemoryError:
            drawn = replace(drawn, free_mib=2 * drawn.free_mib)
        else:
            return


def run_request(
    drawn: Drawn, data: Path, shares: Sequence[float], maker: Executor
) -> Iterator[dict[str, Any]]:
    """Run one request as `autosft tune` does, in a folder that goes away, and yield a row for each share."""
    with tempfile.TemporaryDirectory(prefix="hard-limits-") as folder:
        maker.submit(write_model, drawn, data, Path(folder) / "model").result()
        request = request_for(drawn, data, Path(folder))
        started = time.monotonic()
        with open_study(request, observe=say_nothing) as study:
            with Watch() as watch:
                runner = Limited(inner=study.runner, share=shares[0])
                with contextlib.suppress(StudyFailedError):
                    run_study(
                        study.run,
                        records=study.records,
                        runner=runner,
                        leases=study.leases,
                        observe=say_nothing,
                        stop_requested=lambda: runner.end is not None,
                    )
            job = runner.job
            yield row_of(drawn, shares[0], started, job, runner.end, watch)
            for number, share in enumerate(shares[1:] if job is not None else (), start=2):
                assert job is not None
                started = time.monotonic()
                again = Limited(inner=study.runner, share=share)
                with Watch() as watch:
                    again.run(replace(job, attempt=number, output_dir=f"{job.output_dir}-{number}"))
                    while again.end is None:
                        again.events(1.0)
                yield row_of(drawn, share, started, job, again.end, watch)


def row_of(
    drawn: Drawn, share: float, started: float, job: TrialJob | None, end: AttemptEnd | None, watch: Watch
) -> dict[str, Any]:
    """Return what a line of the file says."""
    row: dict[str, Any] = {
        "request": {name: getattr(drawn, name) for name in Drawn.__dataclass_fields__},
        "share": share,
        "took_s": round(time.monotonic() - started, 1),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "system": platform.platform(),
    }
    if job is None or end is None:
        return {**row, "outcome": "no plan"}
    need = job.plan.estimate.need
    return {
        **row,
        "micro_batch": job.plan.micro_batch,
        "gradient_accumulation": job.plan.gradient_accumulation,
        "checkpointing": job.plan.checkpointing.value,
        "predicted_bytes": need.median_bytes,
        "upper_bytes": need.upper_bytes,
        "limit_bytes": limit_of(job, share),
        "outcome": outcome(end),
        "message": end.message[:200],
        "measured_bytes": end.peak_allocated_bytes,
        **watch.peaks(),
    }


def limit_of(job: TrialJob, share: float) -> int:
    """Return the limit of a share, in bytes over what the process has at its start."""
    return job.plan.memory_cap_bytes if share == 1.0 else int(share * job.plan.estimate.need.median_bytes)


def say_nothing(_event: StudyEvent) -> None:
    """Observe a study without a word."""


def outcome(end: AttemptEnd) -> str:
    """Return "ran", "out of memory", or what else went wrong."""
    if end.completed:
        return "ran"
    if end.failure is FailureKind.OUT_OF_MEMORY:
        return "out of memory"
    return f"failed: {end.failure.value if end.failure else end.stopped}"


# --- what is run --------------------------------------------------------------------------------------


def request_for(drawn: Drawn, data: Path, folder: Path) -> TuneRequest:
    """Write data and machine beside the model in `folder` and return the request to tune with them."""
    num_train = NUM_STEPS * drawn.effective_batch_size
    train, held_out = cut_data(data / drawn.data, folder, num_train, drawn)
    machine = profile_hardware("cpu")
    free = drawn.free_mib * MIB
    save_profile(
        replace(machine, devices=(replace(machine.devices[0], free_bytes=free, num_cores=1),)),
        folder / "machine.json",
    )
    return TuneRequest(
        model=str(folder / "model"),
        data=str(train),
        eval_data=str(held_out),
        hardware=str(folder / "machine.json"),
        storage=f"sqlite:///{folder}/study.db",
        output=folder / "out",
        study="limits",
        trials=1,
        epochs=1.0,
        max_train_samples=num_train,
        evaluations=1,
        method=drawn.method,
        padding_free=drawn.padding_free,
        precision=drawn.precision,
        block_size=drawn.seq_len if drawn.data.endswith(".txt") else None,
        space={"seq_len": drawn.seq_len, "effective_batch_size": drawn.effective_batch_size},
    )


def cut_data(file: Path, folder: Path, num_train: int, drawn: Drawn) -> tuple[Path, Path]:
    """Write some of the records, drawn by the request's number: more than are trained on, few to evaluate."""
    chosen = random.Random(drawn.number)
    train, held_out = folder / f"train{file.suffix}", folder / f"eval{file.suffix}"
    if file.suffix == ".txt":
        lines = file.read_text(encoding="utf-8").splitlines()
        start = chosen.randrange(len(lines) // 2)
        train.write_text("\n".join(lines[start : start + 900]), encoding="utf-8")
        held_out.write_text("\n".join(lines[-60:]), encoding="utf-8")
        return train, held_out
    records = json.loads(file.read_text(encoding="utf-8"))
    chosen.shuffle(records)
    short = sorted(records, key=lambda record: len(json.dumps(record)))[: 2 * NUM_EVAL]
    held_out.write_text(json.dumps(short[:NUM_EVAL]), encoding="utf-8")
    rest = [record for record in records if record not in short]
    chosen.shuffle(rest)
    train.write_text(json.dumps(short[NUM_EVAL:] + rest[: 2 * num_train + 20]), encoding="utf-8")
    return train, held_out


def write_model(drawn: Drawn, data: Path, folder: Path) -> None:
    """Write a random model and a tokenizer; in a process of its own, since torch must not compute in ours."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(drawn.number)
    heads = drawn.hidden // 64
    shape = {
        "vocab_size": drawn.vocab_size,
        "hidden_size": drawn.hidden,
        "intermediate_size": 3 * drawn.hidden if drawn.architecture != "gpt_neox" else 4 * drawn.hidden,
        "num_hidden_layers": drawn.num_layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": drawn.number % 2 == 0,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    if drawn.architecture != "gpt_neox":
        shape["num_key_value_heads"] = heads if heads % 2 else heads // 2
    if drawn.architecture == "qwen3":
        shape["head_dim"] = 64
    AutoModelForCausalLM.from_config(AutoConfig.for_model(drawn.architecture, **shape)).save_pretrained(
        folder
    )
    train_tokenizer(data).save_pretrained(folder)


@cache
def train_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<end>", "<pad>", "<unk>"], show_progress=False
    )
    tokenizer.train([str(data / name) for name in DATA], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )


# --- under which limit --------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Limited:
    """A runner whose first attempt runs under the limit that is tried; later ones are of no interest."""

    inner: TrialRunner
    share: float
    job: TrialJob | None = None
    end: AttemptEnd | None = None

    def run(self, job: TrialJob) -> None:
        self.job = self.job or job
        # The limit itself, without the room that autosft leaves above it.
        cap = (limit_of(job, self.share) - ROOM_BYTES) * 10 // 11
        job = replace(job, plan=replace(job.plan, memory_cap_bytes=cap))
        self.inner.run(job)

    def prepare(self, job: TrialJob) -> None:
        """Do nothing: what was loaded ahead would be measured with it."""

    def events(self, timeout_s: float) -> Sequence[TrialEvent]:
        events = self.inner.events(timeout_s)
        self.end = self.end or next((event for event in events if isinstance(event, AttemptEnd)), None)
        return events

    def stop(self, trial: int, attempt: int, reason: StopReason) -> None:
        self.inner.stop(trial, attempt, reason)

    def now(self) -> float:
        return self.inner.now()

    def close(self, *, grace_s: float) -> None:
        self.inner.close(grace_s=grace_s)


@dataclass(kw_only=True)
class Watch:
    """Samples what the trial's process has mapped and what is resident of it, beside its own measurement."""

    interval_s: float = 0.004
    first: dict[int, dict[str, int]] = field(default_factory=dict)
    most: dict[int, dict[str, int]] = field(default_factory=dict)

    def __enter__(self) -> Watch:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def peaks(self) -> dict[str, int]:
        """Return the growth of the forked process that grew most, in bytes by the kernel's names."""
        grown = [
            {f"{name}_growth_bytes": most[name] - self.first[pid][name] for name in most}
            for pid, most in self.most.items()
        ]
        return max(grown, key=lambda item: item["VmData_growth_bytes"], default={})

    def _sample(self) -> None:
        looked = 0.0
        children: list[int] = []
        while not self._over.wait(self.interval_s):
            if time.monotonic() - looked > 0.02:
                children, looked = list(forked_attempts()), time.monotonic()
            for pid in children:
                with contextlib.suppress(OSError, LookupError):
                    now = status_of(pid)
                    self.first.setdefault(pid, now)
                    most = self.most.setdefault(pid, dict(now))
                    for name, size in now.items():
                        most[name] = max(most[name], size)


def forked_attempts() -> Iterator[int]:
    """Yield the processes that warm servers below this process have forked."""
    with contextlib.suppress(psutil.Error):
        for server in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if "autosft.workers.processes.warm_server" in server.cmdline():
                    yield from (child.pid for child in server.children())


def status_of(pid: int) -> dict[str, int]:
    """Return what is mapped and writable, and what is resident, in bytes."""
    lines = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    names = ("VmData", "VmRSS", "RssAnon", "RssFile")
    return {name: int(lines[name].split()[0]) * 1024 for name in names}


# --- what came of it ----------------------------------------------------------------------------------


def in_words(row: dict[str, Any]) -> str:
    drawn = row["request"]
    what = (
        f"{drawn['number']:3} {drawn['architecture']:8} {drawn['hidden']:4}x{drawn['num_layers']:<2} "
        f"{drawn['vocab_size']:6} {drawn['method']:4} {drawn['data'][:6]} {drawn['seq_len']:4}"
    )
    if row["outcome"] == "no plan":
        return f"{what}  no plan in {drawn['free_mib']} MiB"
    mib = {name: row.get(name, 0) / MIB for name in ("predicted_bytes", "upper_bytes", "limit_bytes")}
    grown = {name: row.get(f"{name}_growth_bytes", 0) / MIB for name in ("VmData", "VmRSS", "RssAnon")}
    return (
        f"{what}  {row['micro_batch']:2} x {row['gradient_accumulation']:<2} {row['checkpointing'][:3]}  "
        f"predicted {mib['predicted_bytes']:5.0f} (at most {mib['upper_bytes']:5.0f}) "
        f"limit {mib['limit_bytes']:5.0f}  {row['outcome']:13}  "
        f"measured {(row['measured_bytes'] or 0) / MIB:5.0f}  mapped {grown['VmData']:5.0f} "
        f"resident {grown['VmRSS']:5.0f} anonymous {grown['RssAnon']:5.0f}  {row['took_s']:.0f} s"
    )


def report(rows: Sequence[dict[str, Any]], share: float, num: int) -> None:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    errors = sorted(
        abs(row["predicted_bytes"] / row["measured_bytes"] - 1) for row in rows if row["outcome"] == "ran"
    )
    words = f", median error of those that ran {errors[len(errors) // 2]:.1%}" if errors else ""
    left = num - len(rows)
    print(f"share {share:g}: {len(rows)} requests, {counts}{words}" + (f"; {left} left" * bool(left)))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
