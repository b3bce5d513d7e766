"""Takes tiny models of many families through every command of the product, as a user would type them.

    python benchmarks/whole_product.py --json FILE [--family NAME] [--method full|lora|qlora]
    python benchmarks/whole_product.py --json FILE --table

A chain is: `tune` (two trials), `train best.yaml`, `export --format hub` (a LoRA adapter merged), `chat` with
one prompt, `evaluate` of the trained and the exported model; then the export, loaded by transformers alone,
has to give the logits of the trained checkpoint.  The first form appends a line for each chain that FILE does
not have yet; the second prints a column for the table of docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from families import FAMILIES, SIZES, Family

METHODS = ("full", "lora")
#: Takes bitsandbytes, which few machines without a GPU have.
OPTIONAL = ("qlora",)
NUM_RECORDS = 40
#: Of the logits' spread; what is exported is stored in the checkpoint's precision.
TOLERANCE = 1e-3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: A folder's own classes, as `--trust-remote-code` runs them: the code of two files, one importing the other.
OWN_CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "own_parts.py": """
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class OwnNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return 0.5 * super().forward(hidden_states)
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig
from .own_parts import OwnNorm


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.norm = OwnNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)
""",
}
OWN = Family(
    name="a folder's own classes",
    models="--trust-remote-code",
    config={**SIZES, "model_type": "llama"},
    kind="own code",
)
#: Likewise, with a size that is read from a tensor: nothing predicts its memory, it measures itself.
UNTRACED = replace(OWN, name="own classes that cannot be traced")
_TRACED = "        return 0.5 * super().forward(hidden_states)\n"
_NOT_TRACED = """\
        size = 1 + int((hidden_states > 1e30).sum())
        return 0.5 * super().forward(hidden_states) + hidden_states.new_zeros(size).sum()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A command of a chain and how it ended."""

    name: str
    code: int
    seconds: float
    output: str


def tokenizer() -> Any:
    """Return a byte-level tokenizer whose special tokens have the ids that the families' sizes say."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<s>", "<|im_end|>", "<pad>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["user assistant say yes one two three"], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    made.chat_template = CHATML
    return made


def make_model(family: Family, folder: Path) -> None:
    """Write a tiny model of a family with random weights, and a tokenizer."""
    import torch

    from autosft.profiles.model.model_class import build, config_of

    torch.manual_seed(0)
    model: Any = build(config_of(family.config_json), attn_implementation=family.attention)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if family in (OWN, UNTRACED):
        for name, code in OWN_CODE.items():
            written = code.replace(_TRACED, _NOT_TRACED) if family is UNTRACED else code
            (folder / name).write_text(written.lstrip())
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "own",
            "architectures": ["OwnForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_own.OwnConfig",
                "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
            },
        }
        (folder / "config.json").write_text(json.dumps(config))


def write_data(path: Path) -> None:
    records = [
        {
            "messages": [
                {"role": "user", "content": f"say {n % 7}"},
                {"role": "assistant", "content": f"yes {n % 7}" + " one two" * (n % 3)},
            ]
        }
        for n in range(NUM_RECORDS)
    ]
    path.write_text("\n".join(map(json.dumps, records)) + "\n")


def run_chain(family: Family, method: str, work: Path) -> tuple[list[Step], str]:
    """Run every command of a chain in folder `work`; return the steps, and what is wrong, if anything."""
    make_model(family, work / "model")
    write_data(work / "chats.jsonl")
    trust = ["--trust-remote-code"] if family in (OWN, UNTRACED) else []
    merge = [] if method == "full" else ["--merge"]
    tune = [
        "tune", "--model", "model", "--data", "chats.jsonl", "--study", "s", "--output", "out",
        "--trials", "2", "--epochs", "1", "--evaluations", "2", "--method", method,
        "--effective-batch-size", "8", "--hardware", "cpu", "--precision", "fp32", "--yes", *trust,
    ]  # fmt: skip
    commands = {
        "tune": tune,
        # As on another machine: with another database, that has measured nothing.
        "train": [
            "train", "out/s/best.yaml", "--output", "trained", "--storage", "sqlite:///elsewhere.db", *trust
        ],
        "export": ["export", "s", "--format", "hub", *merge, "--output", "exported"],
        "chat": ["chat", "s", "--prompt", "say 3", "--max-new-tokens", "6", *trust],
        "evaluate": [
            "evaluate", "exported", "trained", "--metric", "eval_loss", "--data", "chats.jsonl", *trust
        ],
    }  # fmt: skip
    steps = []
    for name, command in commands.items():
        steps.append(run(name, command, work))
        if steps[-1].code != 0:
            return steps, f"{name} ended with {steps[-1].code}: {last_line(steps[-1].output)}"
    return steps, unlike(work, trusted=family in (OWN, UNTRACED))


#: A command, whose leases are apart from those of other studies here: a chain's trials take seconds.
_COMMAND = """
import sys
from pathlib import Path
from autosft.profiles.hardware import leases
leases.default_folder = lambda: Path("home/leases").absolute()
from autosft.cli import main
sys.exit(main())
"""


def run(name: str, arguments: list[str], work: Path) -> Step:
    start_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, *arguments],
        cwd=work,
        env={
            **os.environ,
            "XDG_DATA_HOME": str(work / "home/data"),
            "XDG_CACHE_HOME": str(work / "home/cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    took_s = round(time.monotonic() - start_s, 1)
    return Step(name=name, code=done.returncode, seconds=took_s, output=done.stdout)


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1].strip()


def unlike(work: Path, *, trusted: bool) -> str:
    """Say how the export differs from the study's checkpoints, loaded by transformers and peft alone."""
    program = _COMPARE.format(tolerance=TOLERANCE, trusted=trusted)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=work, text=True, capture_output=True, timeout=300, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home/elsewhere")},
    )  # fmt: skip
    return "" if done.returncode == 0 else f"the export: {last_line(done.stdout + done.stderr)}"


_COMPARE = """
import json, sys
from pathlib import Path
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as VISION

def load(folder):
    config = AutoConfig.from_pretrained(folder, trust_remote_code={trusted})
    is_vision = config.model_type in VISION
    auto = AutoModelForImageTextToText if is_vision else AutoModelForCausalLM
    model, report = auto.from_pretrained(
        folder, trust_remote_code={trusted}, dtype=torch.float32, output_loading_info=True
    )
    lost = {{name: keys for name, keys in report.items() if keys}}
    if lost:
        sys.exit(f"loads with {{lost}}")
    return model.eval()

best = json.loads(Path("found.json").read_text()) if Path("found.json").exists() else None
checkpoints = sorted(Path("out").rglob("checkpoints/step-*")) if best is None else best
ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(1))
AutoTokenizer.from_pretrained("exported")
exported = load("exported")
with torch.no_grad():
    got = exported(input_ids=ids).logits.float()
best_off = None
for folder in checkpoints:
    if (folder / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(load("model"), folder).eval()
    else:
        model = load(folder)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits.float()
    off = float((wanted - got).pow(2).mean().sqrt() / wanted.std())
    best_off = off if best_off is None else min(off, best_off)
if best_off is None:
    sys.exit("no checkpoint was kept")
if not best_off < {tolerance}:
    sys.exit(f"its logits are off by {{best_off:.2g}} of their spread from every checkpoint")
"""


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def column(rows: list[dict[str, Any]]) -> str:
    """Return a line for each family: the methods that went through, and what ended the others."""
    lines = []
    for family in (*FAMILIES, OWN, UNTRACED):
        faults = {row["method"]: row["fault"] for row in rows if row["family"] == family.name}
        words = [f"**{name}: {fault}**" if fault else name for name, fault in faults.items()]
        lines.append(f"| {family.name} | {', '.join(words)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--family", action="append")
    parser.add_argument("--method", action="append", choices=(*METHODS, *OPTIONAL))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder in which chains are kept")
    given = parser.parse_args()
    if given.table:
        print(column(read_rows(given.json)))
        return
    there = {(row["family"], row["method"]) for row in read_rows(given.json)}
    for family in (*FAMILIES, OWN, UNTRACED):
        for method in given.method or METHODS:
            if (given.family and family.name not in given.family) or (family.name, method) in there:
                continue
            work = Path(tempfile.mkdtemp(prefix="whole-"))
            steps, fault = run_chain(family, method, work)
            if given.keep is None:
                shutil.rmtree(work)
            else:
                for step in steps:
                    (work / f"{step.name}.log").write_text(step.output)
                given.keep.mkdir(parents=True, exist_ok=True)
                shutil.move(work, given.keep / f"{family.name.replace(' ', '-')}-{method}")
            row = {
                "family": family.name,
                "method": method,
                "fault": fault,
                "seconds": {step.name: step.seconds for step in steps},
            }
            with given.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
