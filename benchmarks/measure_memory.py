"""Measure real peaks of fine-tuning steps on a GPU, to judge the memory model by.

    python benchmarks/measure_memory.py --out measured.jsonl            # on a machine with a GPU
    python benchmarks/measure_memory.py --out dry.jsonl --device cpu    # a dry run with tiny models

    python benchmarks/measure_memory.py --check measured.jsonl          # against what autosft predicts

Needs torch >= 2.11, transformers >= 5.17 and peft; with trl >= 1.16 most settings run trl's own step, as
autosft's trials do.  Every setting runs in a process forked from this one, which has imported the libraries
and never touches CUDA.  Writes one JSON object a line: first what the machine is, then

    kind "peak"   a random setting and the peaks that it took, uncapped
    kind "trial"  the same under `set_per_process_memory_fraction` as a card of 8 to 80 GB: fits or not
    kind "need"   the smallest cap under which a setting ran, by bisection
    kind "cap"    a trial asked for by --caps: lines of {"setting": …, "cap_bytes": …, "label": …}

Lines that are in the file already are not run again, so that a run cut off by --time-budget goes on when it
is started again with the same arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measured_step import SHAPES, TINY_SHAPES, Setting, config_of, measure, num_parameters

CARDS_GIB = (8, 16, 24, 40, 80)
CPU_CAPS_MIB = (48, 160, 320, 640)  # of the dry run
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16, 32)
NUM_STEPS = 4  # the first step has no optimizer state yet; the longest batch comes third
MAX_PARAMETERS_TIMES_TOKENS = 4e13  # about a second a step on an H100-class card
CAP_STEPS = 6  # bisections of the smallest cap: to 1/64 of the gap between allocated and reserved
SMALL_SHARE = 0.2  # settings below this share of the device run side by side


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.check is not None:
        from check_measured import check

        return check(arguments.check, arguments.caps_out)
    deadline = time.monotonic() + arguments.time_budget
    import_libraries()
    device = _device(arguments.device)
    done = read_done(arguments.out)
    with arguments.out.open("a", encoding="utf-8") as out:

        def write(row: dict[str, Any]) -> None:
            out.write(json.dumps(row) + "\n")
            out.flush()
            done[row["key"]] = row

        machine = done.get("machine")
        if machine is None:
            machine = {"kind": "machine", "key": "machine", **_in_child(_machine, device)}
            write(machine)
        plan = list(_plan(arguments, device, machine))
        _run_all(plan, device, machine, arguments.jobs, deadline, done, write)
        for job in _need_jobs(arguments, machine, done):
            if job.key not in done and time.monotonic() < deadline:
                write(_smallest_cap(job, device, done))
    counts: dict[str, int] = {}
    for row in done.values():
        counts[row["kind"]] = counts.get(row["kind"], 0) + 1
    left = sum(job.key not in done for job in [*plan, *_need_jobs(arguments, machine, done)])
    print(f"{arguments.out}: {counts}; {left} left" + (" (start again to go on)" if left else ""))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="measure: JSON lines; goes on where it ends")
    what.add_argument("--check", type=Path, help="compare such a file with predictions (needs autosft)")
    parser.add_argument("--caps-out", type=Path, help="with --check: write trials at and below the bounds")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--settings", type=int, default=220, help="random settings to measure")
    parser.add_argument("--trials", type=int, default=70, help="fits / does not fit trials")
    parser.add_argument("--needs", type=int, default=20, help="smallest caps to find")
    parser.add_argument("--caps", type=Path, help="trials to run: setting, cap_bytes and label a line")
    parser.add_argument("--jobs", type=int, default=3, help="small settings that run side by side")
    parser.add_argument("--time-budget", type=float, default=540.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def import_libraries() -> None:
    """Import what every run needs, before the forks, without touching CUDA."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import peft
    import torch
    import transformers

    del peft
    if has_trl():
        import trl  # noqa: F401
        from trl import SFTTrainer  # noqa: F401
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    assert not initialized, "an import has initialised CUDA, which forks cannot use"


def has_trl() -> bool:
    """Whether trl's own step can be taken."""
    try:
        from trl import SFTTrainer  # noqa: F401
    except Exception:  # trl raises RuntimeError where a dependency is missing
        return False
    return True


def _device(asked: str) -> str:
    import torch

    if asked != "auto":
        if asked == "cuda" and torch.version.cuda is None:
            raise SystemExit("this torch is built without CUDA: use --device cpu for a dry run")
        return asked
    if torch.version.cuda is not None and any(Path("/dev").glob("nvidia[0-9]*")):
        return "cuda"
    print("no GPU found: a dry run on the CPU with tiny models", file=sys.stderr)
    return "cpu"


def _machine(device: str) -> dict[str, Any]:
    """Describe the machine; measure the CUDA context alone on the device."""
    import torch

    versions: dict[str, str | None] = {}
    for package in ("torch", "transformers", "peft", "trl", "accelerate"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    row: dict[str, Any] = {"device": device, "python": platform.python_version(), "versions": versions}
    if device == "cpu":
        return row
    torch.cuda.init()  # type: ignore[no-untyped-call]
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(0)
    return row | {
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "cuda": torch.version.cuda,
        "total_bytes": properties.total_memory,
        "used_after_init_bytes": total_bytes - free_bytes,  # context, and other processes if there are any
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }


# What to run


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A setting to run, and under which cap."""

    kind: str
    setting: Setting
    cap_bytes: int | None
    rough_bytes: int
    label: str = ""

    @property
    def key(self) -> str:
        text = json.dumps([self.kind, dataclasses.asdict(self.setting), self.cap_bytes, self.label])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plan(arguments: argparse.Namespace, device: str, machine: dict[str, Any]) -> Iterator[Job]:
    """Random settings, then trials; the same ones for the same arguments, except for --caps."""
    total_bytes = machine.get("total_bytes", 4 << 30)
    names = list(TINY_SHAPES if device == "cpu" else SHAPES)
    counts = {name: num_parameters(name) for name in names}
    rng = random.Random(arguments.seed)
    for index in range(arguments.settings):
        setting, rough = _random_setting(rng, names[index % len(names)], counts, device, 0.7 * total_bytes)
        yield Job(kind="peak", setting=setting, cap_bytes=None, rough_bytes=rough)
    context = machine.get("used_after_init_bytes", 0)
    for index in range(arguments.trials):
        if device == "cpu":
            cap, card = CPU_CAPS_MIB[index % len(CPU_CAPS_MIB)] << 20, "dry run"
        else:
            cap = (CARDS_GIB[index % len(CARDS_GIB)] << 30) - context
            card = f"{CARDS_GIB[index % len(CARDS_GIB)]} GB"
        if cap > total_bytes - context:
            continue
        # Near the edge on purpose: the rough figure is off by a third, so both answers occur.
        for _ in range(2000):
            setting, rough = _random_setting(rng, rng.choice(names), counts, device, 0.9 * total_bytes)
            if device == "cpu" or 0.75 < rough / cap < 1.35:
                break
        yield Job(kind="trial", setting=setting, cap_bytes=cap, rough_bytes=cap, label=card)
    if arguments.caps is not None:
        for line in arguments.caps.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield Job(
                kind="cap",
                setting=setting_of(row["setting"]),
                cap_bytes=row["cap_bytes"],
                rough_bytes=row["cap_bytes"],
                label=row.get("label", ""),
            )


def setting_of(row: dict[str, Any]) -> Setting:
    """Return the setting that a line of the file describes."""
    values = dict(row)
    values["lengths"] = tuple(tuple(rows) for rows in values["lengths"])
    if isinstance(values["targets"], list):
        values["targets"] = tuple(values["targets"])
    return Setting(**values)


def _random_setting(
    rng: random.Random, shape: str, counts: dict[str, int], device: str, limit_bytes: float
) -> tuple[Setting, int]:
    """Draw settings until one is small enough for the device and quick enough to run."""
    while True:
        setting = _draw(rng, shape, device)
        rough = rough_bytes(setting, counts[shape])
        tokens = setting.batch * setting.seq
        if rough < limit_bytes and counts[shape] * tokens <= MAX_PARAMETERS_TIMES_TOKENS:
            return setting, rough


def _draw(rng: random.Random, shape: str, device: str) -> Setting:
    lora = rng.random() < 0.5
    is_gpt2 = "gpt2" in shape
    longest = 128 if device == "cpu" else 1024 if is_gpt2 else 8192
    base = rng.choice([length for length in LENGTHS if length <= longest])
    seq = base if rng.random() < 0.3 else min(longest, rng.randint(base // 2 + 1, base))
    batch = rng.choice([count for count in BATCHES if device == "cuda" or count <= 4])
    attention = ("c_attn",) if is_gpt2 else ("q_proj", "v_proj")
    accumulation = rng.choice((1, 1, 1, 2))
    return Setting(
        shape=shape,
        method="lora" if lora else "full",
        rank=rng.choice((8, 16, 64)) if lora else None,
        targets=rng.choice((attention, "all-linear")) if lora else None,
        precision=rng.choice(("bf16", "bf16-autocast")),
        optimizer=rng.choice(("adamw_torch", "adamw_torch_fused")),
        checkpointing=rng.random() < 0.5,
        accumulation=accumulation,
        lengths=_lengths(rng, batch, seq, NUM_STEPS * accumulation),
        prompt_share=rng.choice((0.0, 0.3, 0.6)),
        step="trl" if has_trl() and rng.random() < 0.75 else "plain",
    )


def _lengths(rng: random.Random, batch: int, seq: int, num_batches: int) -> tuple[tuple[int, ...], ...]:
    """Constant lengths in a third of the settings; else uneven ones, the longest in the third batch."""
    if rng.random() < 0.33:
        return ((seq,) * batch,) * num_batches
    batches = [[max(8, int(seq * rng.betavariate(2, 4))) for _ in range(batch)] for _ in range(num_batches)]
    batches[2][0] = seq
    return tuple(tuple(rows) for rows in batches)


def rough_bytes(setting: Setting, parameters: int) -> int:
    """Return about what a setting takes: enough to keep clear of the device's end, no more than that."""
    weight = 2 if setting.precision == "bf16" else 4
    tokens = setting.batch * setting.seq
    config = config_of(setting.shape)
    layers, hidden, vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size
    inner = getattr(config, "intermediate_size", 4 * hidden)
    static = parameters * weight * (1 if setting.method == "lora" else 4)
    if setting.method == "full" and setting.optimizer == "adamw_torch":
        static += parameters * weight
    layer = tokens * (10 * hidden + 4 * inner) * 2
    activations = layers * tokens * hidden * 2 + layer if setting.checkpointing else layers * layer
    logits = tokens * vocabulary * 10 if setting.step == "plain" else vocabulary * hidden * 8
    return int(static + activations + logits)


# Running


def _run_all(
    plan: Sequence[Job],
    device: str,
    machine: dict[str, Any],
    jobs: int,
    deadline: float,
    done: dict[str, Any],
    write: Any,
) -> None:
    """Run what is not done: small settings side by side, each capped at its share, the others alone."""
    total_bytes = machine.get("total_bytes", 0)
    waiting = [job for job in plan if job.key not in done]
    small = [job for job in waiting if device == "cuda" and job.rough_bytes < SMALL_SHARE * total_bytes]
    alone = [job for job in waiting if job not in small]
    running: list[tuple[Job, Any, Any]] = []
    share = int(0.9 * total_bytes / max(1, jobs))
    while (small or running) and jobs > 1:
        while small and len(running) < jobs and time.monotonic() < deadline:
            job = small.pop(0)
            cap = share if job.cap_bytes is None else min(share, job.cap_bytes)
            running.append((job, *_start(measure_job, job.setting, device, cap)))
        if not running:
            break
        for entry in list(running):
            job, process, pipe = entry
            if pipe.poll(0.01) or not process.is_alive():
                running.remove(entry)
                answer = _finish(process, pipe)
                if answer.get("fits") is False and (job.cap_bytes is None or job.cap_bytes > share):
                    alone.append(job)  # its share was too small: once more with all of the device
                else:
                    write(_row(job, answer))
    for job in [*small, *alone]:
        if time.monotonic() >= deadline:
            return
        write(_row(job, _in_child(measure_job, job.setting, device, job.cap_bytes)))


def _row(job: Job, answer: dict[str, Any]) -> dict[str, Any]:
    setting = dataclasses.asdict(job.setting)
    return {"kind": job.kind, "key": job.key, "setting": setting, "cap_bytes": job.cap_bytes,
            "label": job.label, **answer}  # fmt: skip


def measure_job(setting: Setting, device: str, cap_bytes: int | None) -> dict[str, Any]:
    return measure(setting, device=device, cap_bytes=cap_bytes)


def _need_jobs(arguments: argparse.Namespace, machine: dict[str, Any], done: dict[str, Any]) -> list[Job]:
    """Return the settings whose smallest cap is to be found: those measured first with a gap to bisect."""
    if machine["device"] == "cpu":
        return []
    peaks = [row for row in done.values() if row["kind"] == "peak" and row["fits"]]
    gaps = [row for row in peaks if row["peak_reserved_bytes"] > 1.03 * row["peak_allocated_bytes"]]
    return [
        Job(kind="need", setting=setting_of(row["setting"]), cap_bytes=None,
            rough_bytes=row["peak_reserved_bytes"], label=row["key"])
        for row in sorted(gaps, key=lambda row: str(row["key"]))[: arguments.needs]
    ]  # fmt: skip


def _smallest_cap(job: Job, device: str, done: dict[str, Any]) -> dict[str, Any]:
    """Bisect the cap between the peak of live tensors and the peak of an uncapped run."""
    peak = done[job.label]
    low, high = peak["peak_allocated_bytes"], peak["peak_reserved_bytes"]
    for _ in range(CAP_STEPS):
        middle = (low + high) // 2
        if _in_child(measure_job, job.setting, device, middle)["fits"]:
            high = middle
        else:
            low = middle
    return _row(job, {"fits": True, "need_bytes": high, "not_enough_bytes": low})


def _start(function: Any, *arguments: Any) -> tuple[Any, Any]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    return process, ours


def _child(pipe: Any, function: Any, arguments: tuple[Any, ...]) -> None:
    try:
        silent = os.open(os.devnull, os.O_WRONLY)  # trl and transformers print as they go
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        pipe.send(function(*arguments))
    except BaseException:  # becomes a row that says what went wrong
        pipe.send({"fits": None, "error": traceback.format_exc(limit=4)[-1500:]})
    finally:
        pipe.close()
        os._exit(0)  # no clean-up of the parent's state


def _finish(process: Any, pipe: Any) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = pipe.recv()
    except EOFError:
        process.join()
        answer = {"fits": None, "error": f"the process ended with code {process.exitcode}"}
    process.join()
    pipe.close()
    return answer


def _in_child(function: Any, *arguments: Any) -> dict[str, Any]:
    return _finish(*_start(function, *arguments))


def read_done(path: Path) -> dict[str, Any]:
    """Return the rows of the file that stand, by key: a row that ended in an error is to be tried again."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row["key"]: row for row in rows if row.get("fits") is not None or row["kind"] == "machine"}


if __name__ == "__main__":
    sys.exit(main())
