"""Check which methods of trl's SFTTrainer a user's trainer class overrides."""

from __future__ import annotations

from dataclasses import dataclass

from autosft.profiles.errors import UserError
from autosft.profiles.user_code import UserCode, find, load

#: Used in training and traced by the memory model.
FOLLOWED = (
    "compute_loss",
    "compute_loss_context_manager",
    "create_optimizer",
    "training_step",
    "_prepare_inputs",
)
#: Used in training; they allocate no device memory in a training step.
HARMLESS = (
    "add_callback",
    "create_scheduler",
    "floating_point_ops",
    "get_decay_parameter_names",
    "log",
    "save_model",
    "store_flos",
    "_save",
)
#: Never called: autosft evaluates, saves and publishes itself.
UNUSED = (
    "create_model_card",
    "evaluate",
    "evaluation_loop",
    "get_eval_dataloader",
    "get_test_dataloader",
    "hyperparameter_search",
    "predict",
    "prediction_step",
    "push_to_hub",
    "_get_eval_sampler",
    "_prepare_dataset",
)

_BATCHES = (
    "autosft chooses the examples of every optimizer step, so that they are the same on any device",
    "Change the data itself: --data, --max-rounds, --max-train-samples.",
)
_LOOP = (
    "autosft has to be able to stop, save and resume the loop at any step",
    "Do it in training_step, compute_loss, create_optimizer, or a TrainerCallback that your __init__ adds.",
)
#: Why a method must not be overridden, and what to do instead; unlisted methods are parts of the loop.
REFUSED = {
    "get_batch_samples": _BATCHES,
    "get_train_dataloader": _BATCHES,
    "_get_dataloader": _BATCHES,
    "_get_train_sampler": _BATCHES,
    "_get_num_items_in_batch": _BATCHES,
    "create_optimizer_and_scheduler": (
        "autosft calls its two parts separately",
        "Override create_optimizer and create_scheduler instead.",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """The methods of trl's trainer that a class overrides."""

    followed: tuple[str, ...]
    unused: tuple[str, ...]

    def describe(self) -> str:
        """Return a sentence for the plan."""
        words = f"with its own {', '.join(self.followed)}" if self.followed else "trl's step"
        if self.unused:
            words += f"; not called, since autosft does that itself: {', '.join(self.unused)}"
        return words


def find_trainer(name: str) -> UserCode:
    """Find a user's trainer class.  Raises UserError if it does not derive from SFTTrainer or is refused."""
    from trl import SFTTrainer

    code = find(name, flag="--trainer")
    found = load(code, flag="--trainer")
    if not (isinstance(found, type) and issubclass(found, SFTTrainer)):
        raise UserError(
            f"--trainer {name} is not a subclass of trl's SFTTrainer.",
            remedy="Derive it from trl.SFTTrainer, or give a loss function with --loss.",
        )
    overrides(found, name=name)  # raises for overrides that are refused
    return code


def overrides(trainer: type, *, name: str) -> Overrides:
    """Return what a subclass of SFTTrainer overrides.

    Raises UserError, with a remedy, for overrides that would break exact training or its prediction.
    """
    from trl import SFTTrainer

    ours = dir(SFTTrainer)
    changed = [
        our
        for our in ours
        if not (our.startswith("__") and our != "__init__")
        and getattr(trainer, our) is not getattr(SFTTrainer, our)
        and callable(getattr(SFTTrainer, our))
    ]
    for item in changed:
        if item not in (*FOLLOWED, *HARMLESS, *UNUSED, "__init__"):
            why, remedy = REFUSED.get(item, _LOOP)
            raise UserError(f"--trainer {name} overrides {item}, but {why}.", remedy=remedy)
    return Overrides(
        followed=tuple(item for item in changed if item in (*FOLLOWED, *HARMLESS)),
        unused=tuple(item for item in changed if item in UNUSED),
    )
