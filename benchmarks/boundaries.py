"""What did and did not fit on a card: does the memory model say the same?

A setting is said to fit when its upper bound and the CUDA context are at most what the card has for a
process.  Two mistakes count: "fits" where the source ran out of memory, and a refusal of what fitted.
Settings whose source leaves batch, length, versions or kernels open are listed with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from harnesses import NotPredictable, Prediction, Row, predict

#: CUDA context and libraries of a training process outside of torch's allocator (docs/memory.md).
CONTEXT_BYTES = 500 << 20

#: Rank and targets of LitGPT's config_hub/finetune/<model>/lora.yaml and qlora.yaml where all linear layers
#: have adapters; the others train queries and values with rank 32.
_EVERYWHERE = ("query", "key", "value", "projection", "mlp", "head")
_CONFIG_HUB_RANKS = {"gemma-7b": 16, "gemma2-9b": 16, "gemma2-2b": 8, "gemma-2b": 8, "phi-2": 8, "phi-3": 8}
_CONFIG_HUB_FULL_GPUS = {"llama-3-8b": 4, "llama-2-7b": 4, "llama-3.1-8b": 4}

_REASONS = {
    "Unsloth docs": "Unsloth's own kernels, or versions, loss and optimizer not stated, at the very edge",
    "PEFT README": "batch, length and precision are not stated",
    "ms-swift": "the model's own remote code over two GPUs by device_map; versions not stated",
    "Liger": "packing, precision of the master weights and versions are not stated",
}


def judge_boundaries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Judge every row, print the answers, and return one a row, in order."""
    from memory_accuracy import NOT_OUR_STACK, calibration_without

    from autosft.profiles.memory.calibration import bound_for

    answers = []
    for row in rows:
        answer = {key: row.get(key) for key in ("source", "model_id", "config", "gpu_capacity", "fits")}
        try:
            measured = litgpt_row(row)
            capacity = card_bytes(str(row["gpu_capacity"]))
            prediction = predict(measured)
        except NotPredictable as error:
            answers.append({**answer, "predicted_fits": None, "reason": str(error)})
            continue
        except Exception as error:  # one bad row must not hide the others; it is listed below
            reason = f"failed: {type(error).__name__}: {error}"
            answers.append({**answer, "predicted_fits": None, "reason": reason})
            continue
        bound = bound_for(calibration_without(measured), NOT_OUR_STACK)
        needed = _needed_bytes(prediction)
        upper = int(needed * bound.upper_ratio) + CONTEXT_BYTES
        answers.append(
            {
                **answer,
                "predicted_fits": upper <= capacity,
                "predicted_bytes": needed,
                "upper_bytes": upper,
                "capacity_bytes": capacity,
            }
        )
        _print(answers[-1])
    _summary(answers)
    return answers


def _needed_bytes(prediction: Prediction) -> int:
    # LitGPT's loop is traced for its live tensors; what the allocator needs beyond them under a cap is
    # small against the bound, since it gives cached blocks back before it fails.
    return prediction.allocated_bytes


def litgpt_row(row: Row) -> Row:
    """Read a row's setting as one of LitGPT's; raises NotPredictable for other sources."""
    source = str(row["source"])
    if not source.startswith("LitGPT"):
        raise NotPredictable(_REASONS.get(source, "the source's training loop is not reproduced"))
    text = str(row["config"])
    method = str(row["method"])
    name = str(row["model_id"]).lower()
    batch = re.search(r"(?:micro batch |mb)(\d+)", text)
    length = re.search(r"(?:longest |max_seq |, )(\d{3,5})(?: tokens|\b)", text)
    if batch is None or length is None:
        raise NotPredictable("batch or length is not stated")
    hub = "config_hub" in source
    rank, targets = 8, ["query", "value"]
    if hub and name in _CONFIG_HUB_RANKS:
        rank, targets = _CONFIG_HUB_RANKS[name], list(_EVERYWHERE)
    elif hub:
        rank = 32
    quantization = re.search(r"bnb\.[\w-]+", text)
    if method == "qlora" and quantization is None and not hub:
        raise NotPredictable("the quantization is not stated")
    gpus = int(found.group(1)) if (found := re.match(r"(\d+)x", str(row["gpu_capacity"]))) else 1
    if hub and method != "full":
        gpus = 1  # "All runs are single-GPU experiments" (the table's README)
    elif hub:
        gpus = min(gpus, _CONFIG_HUB_FULL_GPUS.get(name, 1))
    return {
        "source": "LitGPT config_hub table" if hub else "LitGPT resource tables",
        "model_id": row["model_id"],
        "method": method,
        "lora_r": rank if "lora" in method else None,
        "lora_targets": targets if "lora" in method else None,
        "quantization": quantization.group(0) if quantization else "bnb.nf4" if method == "qlora" else None,
        "mixed_precision": "bf16-mixed" if "bf16-mixed" in text else "none",
        "per_device_batch": int(batch.group(1)),
        "seq_len": int(length.group(1)),
        "n_gpus": gpus,
        "gpu": row["gpu_capacity"],
    }


def card_bytes(text: str) -> int:
    """Return what a card of that description has for a process, from the table of known devices."""
    table = json.loads(files("autosft.profiles.data").joinpath("devices.json").read_text(encoding="utf-8"))
    devices = table["devices"]
    flat = text.lower().replace(" ", "").replace("-", "")
    for device in devices:
        if device["name"].lower().replace("-", "") in flat:
            return int(device["usable_mib"]) << 20
    found = re.search(r"(\d+)\s*gb", text.lower())
    if found is None:
        by_name = [device for device in devices if device["name"].lower().split("-")[0] in flat]
        if not by_name:
            raise NotPredictable(f"no card is known as {text}")
        return max(int(item["usable_mib"]) for item in by_name) << 20
    size = int(found.group(1))
    near = [device for device in devices if round(device["total_mib"] / 1024) == size]
    return (max(int(item["usable_mib"]) for item in near) << 20) if near else size << 30


def _print(answer: dict[str, Any]) -> None:
    gib = 1 << 30
    said = "fits" if answer["predicted_fits"] else "does not fit"
    saw = "fitted" if answer["fits"] else "out of memory"
    wrong = "" if answer["predicted_fits"] == answer["fits"] else "  WRONG"
    print(
        f"{answer['source'][:22]:22} {answer['model_id'][:16]:16} {answer['config'][:58]:58} "
        f"at most {answer['upper_bytes'] / gib:6.2f} of {answer['capacity_bytes'] / gib:6.2f} GiB: "
        f"{said}; source: {saw}{wrong}",
        flush=True,
    )


def _summary(answers: Sequence[dict[str, Any]]) -> None:
    judged = [answer for answer in answers if answer["predicted_fits"] is not None]
    false_fits = sum(answer["predicted_fits"] and not answer["fits"] for answer in judged)
    refusals = sum(answer["fits"] and not answer["predicted_fits"] for answer in judged)
    left = [answer for answer in answers if answer["predicted_fits"] is None]
    if left:
        print(f"\nnot predicted ({len(left)}):")
        for answer in left:
            print(f"  {answer['source']}, {answer['model_id']}, {answer['gpu_capacity']}: {answer['reason']}")
    print(f"\n{len(judged)} judged: {false_fits} false fits, {refusals} refusals of what fitted")
