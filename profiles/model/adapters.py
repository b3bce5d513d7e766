"""The adapters that can be trained on a frozen model: our names for them, peft's kinds and options.

Training (`workers.training`) and the memory model both run peft's own code, so that only names and supported
settings are listed here.
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
    """A kind of adapter: its peft type, and its fields for our settings."""

    peft_type: str
    rank: str | None = "r"
    alpha: str | None = None
    targets: bool = True  # whether it has target modules; else it selects layers itself
    can_merge: bool = True  # whether it can be merged into the adapted weights
    is_prompt: bool = False  # whether it prepends virtual tokens to each row
    starts_as_base: bool = True  # whether the model equals its base before the first step
    reads_values: bool = False  # of tensors, at creation; they decide no shapes
    options: tuple[tuple[str, Option], ...] = ()  # where peft's default does not fit every model


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


#: By their names on the command line; peft's other adapters are in `REFUSED`.
KINDS: Mapping[str, Kind] = {
    "lora": Kind(peft_type="LORA", alpha="lora_alpha"),
    "beft": Kind(peft_type="BEFT", rank=None, can_merge=False),  # cannot be merged into layers without a bias
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

#: Variants of LoRA, with their fields of AdapterSettings.
LORA_VARIANTS: Mapping[str, Mapping[str, bool]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
}

#: Values of LoRA's `init_lora_weights` that do not change the base weights.
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal")

_ADDS_SPARSE = "it adds sparse matrices, which torch does not follow without values: its memory is unknown"
_NEEDS_TASKS = "it wants the number of a task with every example"
_NEEDS_LOOP = "it has to be called after every step, which the trainer does not do"
_CHANGES_BASE = "it changes the weights under it, so that its checkpoint alone does not give the model back"
#: Why peft's other adapters cannot be used.
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
    """Parse "ia3" or "prefix_tuning,num_virtual_tokens=8" into fields of AdapterSettings.

    Raises UserError for kinds that cannot be used.
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
    """Return the searched settings that the adapter does not have."""
    kind = KINDS[chosen(text)["kind"]]
    taken = {"lora_rank": kind.rank, "lora_alpha_ratio": kind.alpha, "lora_targets": kind.targets}
    return tuple(name for name, is_taken in taken.items() if not is_taken)


def peft_config(adapter: AdapterSettings, model: Any = None) -> Any:
    """Return peft's configuration of an adapter.  Raises UserError for options that peft rejects.

    `model` is the model to adapt, if known: "all-linear" is then resolved to its trainable layers.
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
    """Return the fields of peft's configuration of an adapter, including our settings under peft's names."""
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
    """Raise UserError for an adapter on the output head: trl's loss reads the head's own weight.

    Embeddings that are tied to the head may have an adapter.
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
    """Return whether an adapter is trained in fp32: always, except on 4-bit weights in a bf16 study.

    trl casts adapters on 4-bit weights to bf16, whatever the precision; in a study of another precision they
    are held in fp32 again.
    """
    return method is not Method.QLORA or not precision.has_bf16_weights


def hold_trained_in_fp32(model: Any) -> None:
    """Cast trained weights to fp32, as `hold_in_fp32` does."""
    hold_in_fp32(model, [parameter for parameter in model.parameters() if parameter.requires_grad])


def hold_in_fp32(model: Any, parameters: Iterable[Any]) -> None:
    """Cast an adapter's weights to fp32: peft does so for those that it adds, not for copies of layers.

    Such copies (ln_tuning, `modules_to_save`) then compute in fp32 and cast their outputs back.
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


def describe_start(adapter: AdapterSettings | None) -> str:
    """Return a note if an adapter does not start as its base model, else "".

    peft initialises some kinds randomly, and others if their options ask for it.
    """
    if adapter is None:
        return ""
    kind, options = KINDS[adapter.kind], dict(adapter.options)
    is_asked_for = any(name.startswith("init_") and value is False for name, value in options.items())
    if kind.starts_as_base and not is_asked_for:
        return ""
    what = "its virtual tokens are" if kind.is_prompt else "its weights are"
    return (
        f"Adapter: {adapter.kind} does not start as the base model: {what} random at first (as in peft), "
        "so that the loss may start above the base model's."
    )


def describe_adapter(adapter: AdapterSettings) -> str:
    """Describe an adapter: "rank 16 on all-linear", "ia3 on all-linear"."""
    kind = KINDS[adapter.kind]
    name = next((name for name, on in (("dora", adapter.use_dora), ("rslora", adapter.use_rslora)) if on), "")
    words = [name or adapter.kind] if name or adapter.kind != "lora" else []
    words += [f"rank {adapter.rank}"] if kind.rank is not None else []
    words += [f"{name} {value}" for name, value in adapter.options]
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    return ", ".join(words) + (f" on {targets}" if kind.targets else "")
