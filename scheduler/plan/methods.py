"""Which methods a plan compares, and a plan as plain JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autosft.profiles.dataset import truncation_report
from autosft.profiles.memory.padding_free import require_padding_free
from autosft.profiles.model.adapters import chosen
from autosft.profiles.model.quantization import require_method, why_no_method
from autosft.profiles.recipe import Method
from autosft.scheduler.plan.method_plan import MethodPlan
from autosft.scheduler.plan.remedies import shorter_lengths
from autosft.scheduler.plan.task import Task
from autosft.studies.wire import to_plain

METHODS = ("full", "lora", "qlora")


def methods_with(adapter: str) -> tuple[str, ...]:
    """Return the methods to compare: QLoRA is predicted only for LoRA and its variants."""
    return METHODS if chosen(adapter)["kind"] == "lora" else ("full", "lora")


def methods_to_plan(task: Task, method: str, adapter: str) -> tuple[Method, ...]:
    """Return the methods to plan: a comparison leaves out what the model's weights rule out.

    Raises UserError where they rule out the one that is asked for.
    """
    model = task.model
    if method != "auto":
        methods: tuple[Method, ...] = (Method(method),)
    else:
        compared = (Method(name) for name in methods_with(adapter))
        methods = tuple(
            each
            for each in compared
            if not why_no_method(model.quantization, each)
            and not (each is Method.FULL and model.adapter is not None)
        )
    for each in methods:
        require_method(model.source, model.quantization, each)
    return methods


def without_padding(task: Task, adapter: str) -> Task:
    """Return the task with micro batches of one row.  Raises UserError for a model that cannot do so."""
    require_padding_free(task.model, adapter=str(chosen(adapter)["kind"]), longest=task.seq_len)
    return replace(task, padding_free=True)


def task_as_plain(task: Task) -> dict[str, Any]:
    """Return the task as plain JSON."""
    lengths = [task.seq_len, *shorter_lengths(task.seq_len)]
    return {
        "model": task.model.source,
        "num_parameters": task.model.num_parameters,
        "data": None if task.data is None else task.data.source,
        "seq_len": task.seq_len,
        "padding_free": task.padding_free,
        "epochs": task.epochs,
        "num_train_examples": task.num_train_examples,
        "truncation": None if task.data is None else to_plain(truncation_report(task.data, lengths)),
    }


def plan_as_plain(plan: MethodPlan) -> dict[str, Any]:
    """Return a method's plan as plain JSON."""
    nums = [{"num_devices": num, "way": to_plain(way)} for num, way in plan.by_num_devices]
    return {"method": plan.method.value, **to_plain(plan), "by_num_devices": nums}
