"""What a user's trainer class changes of trl's: what is followed, what is never called, what is refused."""

from __future__ import annotations

from dataclasses import dataclass

from autosft.profiles.errors import UserError
from autosft.profiles.user_code import UserCode, find, load

#: Followed by the memory model and trained with: the trace calls the class's own.
FOLLOWED = (
    "compute_loss",
    "compute_loss_context_manager",
    "create_optimizer",
    "training_step",
    "_prepare_inputs",
)
#: Trained with; they take no memory of the device in a training step.
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
#: Never called: autosft evaluates, writes and publishes by itself.
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
    "autosft lays out the examples of every optimizer step, so that any device trains on the same ones",
    "Change the data itself: --data, --max-rounds, --max-train-samples.",
)
_LOOP = (
    "autosft has to be able to stop, save and go on with the loop at any step",
    "Do it in training_step, compute_loss, create_optimizer, or a TrainerCallback that your __init__ adds.",
)
#: Why a method may not be changed, and what to do instead; others of the trainer's own are parts of the loop.
REFUSED = {
    "get_batch_samples": _BATCHES,
    "get_train_dataloader": _BATCHES,
    "_get_dataloader": _BATCHES,
    "_get_train_sampler": _BATCHES,
    "_get_num_items_in_batch": _BATCHES,
    "create_optimizer_and_scheduler": (
        "autosft calls its two halves",
        "Override create_optimizer and create_scheduler instead.",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """The methods of trl's trainer that a class has its own of."""

    followed: tuple[str, ...]
    unused: tuple[str, ...]

    def in_words(self) -> str:
        """Return a sentence for the plan."""
        words = (
            f"its own {', '.join(self.followed)} followed and trained with" if self.followed else "trl's step"
        )
        if self.unused:
            words += f"; not called, since autosft does that itself: {', '.join(self.unused)}"
        return words


def find_trainer(name: str) -> UserCode:
    """Look for a user's trainer class.  Raises UserError when it is none that ours can stand on."""
    from trl import SFTTrainer

    code = find(name, flag="--trainer")
    found = load(code, flag="--trainer")
    if not (isinstance(found, type) and issubclass(found, SFTTrainer)):
        raise UserError(
            f"--trainer {name} is not a subclass of trl's SFTTrainer.",
            remedy="Derive it from trl.SFTTrainer, or give a loss function with --loss.",
        )
    overrides(found, name=name)  # refuses what could not be trained exactly
    return code


def overrides(trainer: type, *, name: str) -> Overrides:
    """Return what a subclass of SFTTrainer changes.

    Raises UserError for what could not be trained exactly, or predicted, with a way out.
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
