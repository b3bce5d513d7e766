"""The settings that a study can search, one row each.

The flags of `tune` and `enqueue`, YAML keys, the search space, sampling, and how settings are shown in a
terminal, in reports and on dashboards follow from the rows.  To add a setting, add a row here and apply it in
training: a field of `trial.TrainingSettings` of the same name, which `workers` reads.
"""

from __future__ import annotations

import difflib
import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from autosft.profiles.errors import UserError
from autosft.profiles.optimizers import DEFAULT as DEFAULT_OPTIMIZER
from autosft.profiles.optimizers import find_optimizer
from autosft.profiles.recipe import Method
from autosft.studies.search.dimensions import Choices, Dimension, Fixed, Range, Value


class Kind(enum.Enum):
    """The type of a setting's values."""

    NUMBER = "number"
    WHOLE_NUMBER = "whole number"
    TEXT = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A setting: its name, its permitted values, and what is searched by default.

    `absent` is the value in studies that were created before there was this row; a setting without `absent`
    is part of every space.
    """

    name: str  # of the flag --NAME, the YAML key, and the parameter of a trial
    help: str
    kind: Kind = Kind.NUMBER
    low: float | None = None  # lowest permitted value; None: no limit
    high: float | None = None
    known: tuple[str, ...] = ()  # permitted texts; empty: any
    check: Callable[[str], object] | None = None  # raises UserError for a text that is not permitted
    example: str  # of a range or choices, in the user's notation
    short: str  # label in lists of settings
    first_word: bool = False  # whether the first of words_joined_by_underscores is enough in such lists
    noun: str  # in sentences
    default: Dimension | None = None  # None: `space.default_space` derives it from model, data and devices
    absent: Dimension | None = None
    of_adapters: bool = False  # applies only if an adapter is trained
    unused: Value | None = None  # value if the adapter does not take the setting
    has_commas: bool = False  # whether "a,b" is one value

    @property
    def is_whole(self) -> bool:
        """Whether its values are whole numbers."""
        return self.kind is Kind.WHOLE_NUMBER

    @property
    def flag(self) -> str:
        """Its flag on the command line."""
        return f"--{self.name.replace('_', '-')}"


#: Whole conversations.
ALL_ROUNDS = Fixed(value=0)

#: transformers' SchedulerType values that need no further arguments.
SCHEDULERS = (
    "linear",
    "cosine",
    "constant_with_warmup",
    "constant",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
)


def _rows(rows: Iterable[Setting]) -> dict[str, Setting]:
    return {row.name: row for row in rows}


#: All searchable settings by name, in display order.
SETTINGS: dict[str, Setting] = _rows(
    (
        Setting(
            name="learning_rate",
            help="Peak learning rate.",
            low=1e-12,
            high=10.0,
            example="1e-5..1e-3 log",
            short="lr ",
            noun="learning rate",
        ),
        Setting(
            name="warmup_ratio",
            help="Fraction of the steps over which the learning rate is warmed up.",
            low=0.0,
            high=0.99,
            example="0..0.2 step 0.05",
            short="warm-up ",
            noun="warm-up",
            default=Range(low=0.0, high=0.2, step=0.02, default=0.1),
        ),
        Setting(
            name="weight_decay",
            help="Weight decay.",
            low=0.0,
            high=1.0,
            example="0..0.1",
            short="decay ",
            noun="weight decay",
            default=Range(low=0.0, high=0.1, step=0.01, default=0.01),
        ),
        Setting(
            name="lr_scheduler",
            help="Learning rate schedule: cosine, linear, …",
            kind=Kind.TEXT,
            known=SCHEDULERS,
            example="linear, cosine",
            short="",
            first_word=True,
            noun="schedule",
            default=Choices(values=("cosine", "linear", "constant_with_warmup")),
        ),
        Setting(
            name="effective_batch_size",
            help="Examples per optimizer step; micro batch and gradient accumulation are derived from it.",
            kind=Kind.WHOLE_NUMBER,
            low=1,
            example="16..128",
            short="batch ",
            noun="effective batch",
        ),
        Setting(
            name="seq_len",
            help="Length in tokens to which examples are truncated.",
            kind=Kind.WHOLE_NUMBER,
            low=2,  # one token to read and one to predict
            example="512..2048",
            short="len ",
            noun="length",
        ),
        Setting(
            name="method",
            help="What is trained.",
            kind=Kind.TEXT,
            known=tuple(method.value for method in Method),
            example="full, lora",
            short="",
            noun="method",
        ),
        Setting(
            name="optimizer",
            help="Optimizer, by its transformers name; autosft plan --optimizer help lists them.",
            kind=Kind.TEXT,
            check=find_optimizer,
            example="adamw_torch_fused, adafactor",
            short="",
            noun="optimizer",
            default=Fixed(value=DEFAULT_OPTIMIZER),
        ),
        Setting(
            name="lora_rank",
            help="Rank of LoRA adapters.",
            kind=Kind.WHOLE_NUMBER,
            low=1,
            example="4..64 log",
            short="r ",
            noun="rank",
            default=Choices(values=(4, 8, 16, 32, 64), default=16),
            of_adapters=True,
            unused=8,
        ),
        Setting(
            name="lora_alpha_ratio",
            help="LoRA's alpha over its rank.",
            low=1e-3,
            high=1e3,
            example="0.5..4 log",
            short="alpha/r ",
            noun="alpha over rank",
            default=Choices(values=(1.0, 2.0, 4.0), default=2.0),
            of_adapters=True,
            unused=1.0,
        ),
        Setting(
            name="lora_targets",
            help="Modules to adapt: all-linear, or names.",
            kind=Kind.TEXT,
            example="[all-linear, 'q_proj,v_proj']",
            short="on ",
            noun="adapted modules",
            default=Fixed(value="all-linear"),
            of_adapters=True,
            unused="all-linear",
            has_commas=True,
        ),
        Setting(
            name="max_rounds",
            help="Maximum number of rounds (a user turn and its answer) to keep of a conversation.",
            kind=Kind.WHOLE_NUMBER,
            low=1,
            example="4, 6, 8",
            short="rounds ",
            noun="rounds",
            default=ALL_ROUNDS,
            absent=ALL_ROUNDS,
        ),
    )
)


def find_setting(name: str) -> Setting:
    """Return a setting.  Raises UserError with the nearest known name."""
    if name not in SETTINGS:
        nearest = difflib.get_close_matches(name, SETTINGS, n=1)
        hint = f"Did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"{name} is not a searchable setting.", remedy=f"{hint}Known: {', '.join(SETTINGS)}.")
    return SETTINGS[name]
