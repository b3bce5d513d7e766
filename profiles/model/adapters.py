"""The adapters that a frozen model can be given: names of ours, kinds and options of peft's.

Every kind is peft's own code, in training (`workers.training`) and on the meta device (`memory`), so nothing
of it is written down here but what it is called and which of our settings it takes.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapted_layers import targets_in
from autosft.profiles.recipe import AdapterSettings, Method, Precision

Option = bool | int | float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of adapter: its peft type, and which settings of ours it takes under which of its names."""

    peft_type: str
    rank: str | None = "r"
    alpha: str | None = None
    targets: bool = True  # whether it is told its layers; else it knows them
    can_merge: bool = True  # whether it can be written into the weights that it adapts
    is_prompt: bool = False  # whether it puts tokens of its own before those of each row
    starts_as_base: bool = True  # whether the model says what its base does before the first step
    reads_values: bool = False  # of tensors, while it is made; they decide no shapes
    options: tuple[tuple[str, Option], ...] = ()  # where its own default does not fit every model


def _prompt(peft_type: str) -> Kind:
    return Kind(
        peft_type=peft_type,
        rank=None,
        targets=False,
        can_merge=False,
        is_prompt=True,
        starts_as_base=False,
        options=(("num_virtual_tokens", 20),),
    )


#: By the name that the command line takes; the others of peft are in `REFUSED`.
KINDS: Mapping[str, Kind] = {
    "lora": Kind(peft_type="LORA", alpha="lora_alpha"),
    "beft": Kind(peft_type="BEFT", rank=None, can_merge=False),  # layers without a bias have no place for it
    "boft": Kind(peft_type="BOFT", rank=None, reads_values=True),
    "c3a": Kind(peft_type="C3A", rank=None, starts_as_base=False, options=(("block_size", 16),)),
    "cartridge": _prompt("CARTRIDGE"),
    "deft": Kind(peft_type="DEFT", alpha="alpha"),
    "delora": Kind(peft_type="DELORA"),
    "fourierft": Kind(peft_type="FOURIERFT", rank=None, starts_as_base=False),
    "glora": Kind(peft_type="GLORA"),
    "gralora": Kind(peft_type="GRALORA", alpha="alpha"),
    "hira": Kind(peft_type="HIRA"),
    "hra": Kind(peft_type="HRA"),
    "ia3": Kind(peft_type="IA3", rank=None, options=(("feedforward_modules", "down_proj"),)),
    "lily": Kind(peft_type="LILY", can_merge=False),
    "ln_tuning": Kind(peft_type="LN_TUNING", rank=None, targets=False),
    "loha": Kind(peft_type="LOHA", alpha="alpha"),
    "lokr": Kind(peft_type="LOKR", alpha="alpha"),
    "miss": Kind(peft_type="MISS"),
    "oft": Kind(peft_type="OFT", rank=None),
    "p_tuning": _prompt("P_TUNING"),
    "peanut": Kind(peft_type="PEANUT"),
    "prefix_tuning": _prompt("PREFIX_TUNING"),
    "prompt_tuning": _prompt("PROMPT_TUNING"),
    "pvera": Kind(peft_type="PVERA"),
    "psoft": Kind(peft_type="PSOFT", alpha="psoft_alpha"),
    "randlora": Kind(peft_type="RANDLORA"),
    "road": Kind(peft_type="ROAD", rank=None),
    "supertuning": Kind(peft_type="SUPERTUNING"),
    "tinylora": Kind(peft_type="TINYLORA"),
    "unilora": Kind(peft_type="UNILORA", reads_values=True, starts_as_base=False),
    "vblora": Kind(peft_type="VBLORA", starts_as_base=False),
    "vera": Kind(peft_type="VERA"),
    "waveft": Kind(peft_type="WAVEFT", rank=None),
}

#: LoRA by another name, with the fields of AdapterSettings that make it so.
LORA_VARIANTS: Mapping[str, Mapping[str, bool]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
}

#: Values of LoRA's `init_lora_weights` that leave the weights under it as they are.
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal")

_ADDS_SPARSE = "it adds sparse matrices, which torch does not follow without values: its memory is unknown"
_NEEDS_TASKS = "it wants the number of a task with every example"
_NEEDS_LOOP = "it has to be called after every step, which the trainer does not do"
_CHANGES_BASE = "it changes the weights under it, so that its checkpoint alone does not give the model back"
#: Why the others that peft offers cannot be chosen.
REFUSED: Mapping[str, str] = {
    "adalora": _NEEDS_LOOP,
    "adamss": "it wants scikit-learn, and clusters the weights themselves: a plan does not know its parts",
    "adaption_prompt": "peft has it for some classes of attention only, as they were in older transformers",
    "cpt": "it wants the tokens of a prompt that each example is laid out for",
    "frod": _ADDS_SPARSE,
    "multitask_prompt_tuning": _NEEDS_TASKS,
    "osf": _CHANGES_BASE,
    "poly": _NEEDS_TASKS,
    "shadow": "peft runs it with a forward pass of its own, which transformers' layers of today do not take",
    "shira": _ADDS_SPARSE,
    "trainable_tokens": "it wants the numbers of tokens that the tokenizer was given",
    "xlora": "it mixes LoRA adapters that are trained already",
}


def chosen(text: str) -> dict[str, Any]:
    """Read "ia3" or "prefix_tuning,num_virtual_tokens=8": the fields of AdapterSettings that it stands for.

    Raises UserError for a kind that cannot be chosen.
    """
    name, *given = (part.strip() for part in text.split(","))
    kind = name.lower().replace("-", "_")
    if kind in REFUSED:
        raise UserError(f"--adapter {name}: {REFUSED[kind]}.", remedy="Choose another: autosft tune --help.")
    if kind not in KINDS and kind not in LORA_VARIANTS:
        names = (*KINDS, *LORA_VARIANTS)
        near = difflib.get_close_matches(kind, names, n=1)
        raise UserError(
            f"--adapter {name}: peft has no such adapter.",
            remedy=f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(sorted(names))}.",
        )
    fields: dict[str, Any] = dict(LORA_VARIANTS.get(kind, {}))
    fields["kind"] = kind if kind in KINDS else "lora"
    fields["options"] = tuple(_option(option, text) for option in given)
    start = dict(fields["options"]).get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        raise UserError(
            f"--adapter {text}: {_CHANGES_BASE}.", remedy="Leave init_lora_weights out, or use gaussian."
        )
    return fields


def _option(text: str, whole: str) -> tuple[str, Option]:
    name, is_given, value = (part.strip() for part in text.partition("="))
    if not (name and is_given and value):
        raise UserError(
            f"--adapter {whole}: {text!r} is not an option of it.",
            remedy="Write --adapter KIND,NAME=VALUE, with names of peft's configuration.",
        )
    try:
        known = json.loads(value.lower() if value in ("True", "False") else value)
    except json.JSONDecodeError:
        known = value
    return name, known if isinstance(known, bool | int | float) else value


def unused_settings(text: str) -> tuple[str, ...]:
    """Return the settings of a search that the adapter does not take."""
    kind = KINDS[chosen(text)["kind"]]
    taken = {"lora_rank": kind.rank, "lora_alpha_ratio": kind.alpha, "lora_targets": kind.targets}
    return tuple(name for name, is_taken in taken.items() if not is_taken)


def peft_config(adapter: AdapterSettings, model: Any = None) -> Any:
    """Return peft's configuration of an adapter.  Raises UserError for what peft does not take.

    `model` is what it is going to sit on, where that is known: "all-linear" then means what trains in it.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType

    kind = KINDS[adapter.kind]
    made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.peft_type)]
    try:
        fields = peft_fields(adapter)
        if model is not None and kind.targets:
            fields["target_modules"] = targets_in(model, adapter.targets)
        return made(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--adapter {adapter.kind}: peft does not take {dict(adapter.options)}: {error}",
            remedy=f"Its options are the fields of peft's {made.__name__}.",
        ) from error


def peft_fields(adapter: AdapterSettings) -> dict[str, Any]:
    """Return the fields of peft's configuration of an adapter, those of ours under peft's names."""
    kind = KINDS[adapter.kind]
    values: dict[str, Any] = {}
    if kind.rank is not None:
        values[kind.rank] = adapter.rank
    if kind.alpha is not None:
        values[kind.alpha] = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    if kind.targets:
        targets = adapter.targets
        values["target_modules"] = targets if isinstance(targets, str) else list(targets)
    if adapter.kind == "lora":
        values |= {
            "lora_dropout": adapter.dropout,
            "use_rslora": adapter.use_rslora,
            "use_dora": adapter.use_dora,
            "bias": "none",
        }
    return {**values, "task_type": "CAUSAL_LM", **dict(kind.options), **dict(adapter.options)}


def require_no_head(base: Any) -> None:
    """Raise UserError where an adapter sits on the output head: trl's loss reads the head's own weight.

    Where the head is tied to the embeddings, those may have one.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = base.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        name = next(name for name, module in base.named_modules() if module is head).rpartition(".")[2]
        raise UserError(
            f"--lora-targets {name}: the loss is computed from the output head's own weight, so an adapter "
            "on it would never be trained.",
            remedy=f"Leave {name} out of --lora-targets.",
        )


def holds_adapter_in_fp32(method: Method, precision: Precision) -> bool:
    """Whether an adapter is trained in fp32: always, but for trl's bf16 ones over 4-bit weights.

    A loss scaler refuses fp16 gradients, and on CUDA has no bf16, so that under one they are fp32 as well.
    """
    return method is not Method.QLORA or precision.scales_loss


def hold_trained_in_fp32(model: Any) -> None:
    """Make what is trained fp32, as `hold_in_fp32` does."""
    hold_in_fp32(model, [parameter for parameter in model.parameters() if parameter.requires_grad])


def hold_in_fp32(model: Any, parameters: Iterable[Any]) -> None:
    """Make weights of an adapter fp32: peft does so for those that it adds, not for copies of layers.

    Those (of ln_tuning, and `modules_to_save`) compute in fp32 then, and hand on what they did before.
    """
    from peft.tuners.ln_tuning.layer import LNTuningLayer
    from peft.utils.other import ModulesToSaveWrapper

    narrow = {id(parameter): parameter.dtype for parameter in parameters if parameter.dtype.itemsize < 4}
    for module in model.modules():
        before = {narrow[id(parameter)] for parameter in module.parameters() if id(parameter) in narrow}
        if before and isinstance(module, LNTuningLayer | ModulesToSaveWrapper):
            module.register_forward_hook(_hand_on_as(before.pop()))
    for parameter in model.parameters():
        if id(parameter) in narrow:
            parameter.data = parameter.data.float()


def _hand_on_as(dtype: Any) -> Callable[[Any, tuple[Any, ...], Any], Any]:
    def cast(_: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        return output.to(inputs[0].dtype if inputs and inputs[0].is_floating_point() else dtype)

    return cast


def start_in_words(adapter: AdapterSettings | None) -> str:
    """Say that an adapter does not start as its base model; empty where it does.

    peft makes some kinds that way, and others where they are told not to start from nothing.
    """
    if adapter is None:
        return ""
    kind, options = KINDS[adapter.kind], dict(adapter.options)
    is_asked_for = any(name.startswith("init_") and value is False for name, value in options.items())
    if kind.starts_as_base and not is_asked_for:
        return ""
    what = "its virtual tokens are" if kind.is_prompt else "its weights are"
    return (
        f"Adapter: {adapter.kind} does not start as the base model: {what} random at first (peft's own way), "
        "so that the loss may start above the base model's."
    )


def in_words(adapter: AdapterSettings) -> str:
    """Say what an adapter is: "rank 16 on all-linear", "ia3 on all-linear"."""
    kind = KINDS[adapter.kind]
    name = next((name for name, on in (("dora", adapter.use_dora), ("rslora", adapter.use_rslora)) if on), "")
    words = [name or adapter.kind] if name or adapter.kind != "lora" else []
    words += [f"rank {adapter.rank}"] if kind.rank is not None else []
    words += [f"{name} {value}" for name, value in adapter.options]
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    return ", ".join(words) + (f" on {targets}" if kind.targets else "")
