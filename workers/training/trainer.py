"""The trainer class: trl's SFTTrainer, extended with the user's trainer class and loss, if any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from trl import SFTTrainer

from autosft.profiles.user_code import load
from autosft.studies.trial import TrialJob
from autosft.workers.training.fsdp import gather_optimizer_state, is_sharded, shard_optimizer_state
from autosft.workers.training.optimizers import as_asked, forget_other_trials
from autosft.workers.training.zero_masks import ZeroMasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments


UserLoss = Callable[..., torch.Tensor]  # (outputs, labels, num_items_in_batch=...) -> loss of a micro batch


class Trainer(SFTTrainer):  # type: ignore[misc]
    """trl's trainer, with checkpoints that any number of processes can resume from, and sparse training."""

    # Prefixed, since a user's class may have attributes of any name.
    autosft_loss: UserLoss | None = None  # of --loss
    autosft_masks: ZeroMasks | None = None  # with --method sparse, set when training begins

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: a checkpoint of a trial is not a release."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        forget_other_trials()
        made: torch.optim.Optimizer = super().create_optimizer(model)
        return made

    def get_optimizer_cls_and_kwargs(
        self, args: TrainingArguments, model: PreTrainedModel | None = None
    ) -> tuple[Any, dict[str, Any]]:
        made, fields = super().get_optimizer_cls_and_kwargs(args, model)
        return as_asked(args, made, fields, on_cpu=args.device.type == "cpu")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if isinstance(self.model, PeftModel):  # without an adapter, `load_model` has loaded the checkpoint
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = gather_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(
            Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True
        )
        self.optimizer.load_state_dict(shard_optimizer_state(state, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        if self.autosft_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        loss = self.autosft_loss(outputs, labels, num_items_in_batch=num_items_in_batch)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP averages over processes again
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.autosft_masks is not None and self.accelerator.sync_gradients:
            self.autosft_masks.clear_gradients()  # before they are clipped
        return loss

    def keep_zeros(self) -> None:
        """Keep the weights that are zero now at zero for the rest of the run."""
        self.autosft_masks = ZeroMasks(self.model)
        self.autosft_masks.attach(self.optimizer.optimizer)


def trainer_class(job: TrialJob) -> type[Trainer]:
    """Return our trainer class, derived from the user's class and with the user's loss, if given."""
    pinned = job.pinned
    own = (load(pinned.trainer, flag="--trainer"),) if pinned.trainer is not None else ()
    loss = staticmethod(load(pinned.loss, flag="--loss")) if pinned.loss is not None else None
    return type("Trainer", (Trainer, *own), {"autosft_loss": loss})
