"""What is planned for: a model and data, or a length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autosft.profiles.dataset import PreparedData
    from autosft.profiles.model.profile import ModelProfile
    from autosft.profiles.recipe import Method
    from autosft.scheduler.decide.history import Learned
    from autosft.scheduler.plan.forecast import Forecast
    from autosft.studies.search.dimensions import Dimension
    from autosft.studies.trial import TrainingSettings


#: Number of training examples that is assumed without data.
ASSUMED_EXAMPLES = 10_000
ASSUMED_SEQ_LEN = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model, and the lengths that it would be trained on."""

    model: ModelProfile
    data: PreparedData | None
    seq_len: int
    epochs: float
    num_train_examples: int  # of a full run
    padding_free: bool = False
    optimizer: str | None = None  # None: what a study has by default
    fixed: Mapping[str, Dimension] = field(default_factory=dict)  # other settings that are asked for

    def settings(self, method: Method, effective_batch_size: int | None, adapter: str) -> TrainingSettings:
        from autosft.profiles.errors import UserError
        from autosft.scheduler.plan.forecast import default_settings

        if effective_batch_size is not None and effective_batch_size > self.num_train_examples:
            raise UserError(
                f"--effective-batch-size {effective_batch_size} is above {self.num_train_examples:,}, the "
                "examples of a full run.",
                remedy=f"Use at most {self.num_train_examples}.",
            )
        settings = default_settings(
            method,
            self.model,
            seq_len=self.seq_len,
            effective_batch_size=effective_batch_size,
            num_train_examples=self.num_train_examples,
            adapter=adapter,
            overrides=self.fixed,
        )
        if self.optimizer is not None:
            settings = replace(settings, optimizer=self.optimizer)
        is_given = self.model.adapter is not None and settings.adapter is not None
        return replace(settings, adapter=self.model.adapter) if is_given else settings

    def forecast(self, learned: Learned, cache_dir: Path | None) -> Forecast:
        """Return the forecast that a study of this model and data would use."""
        from autosft.profiles.recipe import LengthProfile
        from autosft.scheduler.decide.cost_models import Models
        from autosft.scheduler.plan.forecast import Forecast
        from autosft.studies.request import TuneRequest

        if self.data is not None:
            num_evaluations = TuneRequest.model_fields["evaluations"].default
            models = Models.of_data(
                self.model, self.data, num_evaluations, learned=learned, cache_dir=cache_dir
            )
            return Forecast(models, padding_free=self.padding_free)
        alike = 256  # number of identical examples; its value does not matter

        def uniform(seq_len: int, _: int | None) -> LengthProfile:
            return LengthProfile(lengths=(seq_len,) * alike, scored=(seq_len,) * alike, max_length=seq_len)

        models = Models(self.model, uniform, learned=learned, cache_dir=cache_dir)
        return Forecast(models, padding_free=self.padding_free)


def read_task(
    source: str,
    data: str | None,
    seq_len: int | None,
    epochs: float,
    cache_dir: Path,
    *,
    trust_remote_code: bool,
    **data_options: Any,
) -> Task:
    """Read the model's shape and the data's lengths; `data_options` are those of `prepare`.

    Raises UserError.
    """
    from autosft.profiles.dataset import choose_seq_len, prepare
    from autosft.profiles.errors import UserError
    from autosft.profiles.model.profile import load_model_profile

    model = load_model_profile(
        source,
        trust_remote_code=trust_remote_code,
        need_tokenizer=data is not None,
        need_weights=False,
        cache_dir=cache_dir,
    )
    longest = model.max_positions or None
    if seq_len is not None and longest is not None and seq_len > longest:
        raise UserError(
            f"--seq-len {seq_len} is above {longest}, the model's longest position.",
            remedy=f"Use at most {longest}.",
        )
    prepared = None
    if data is None:
        chosen = seq_len or min(ASSUMED_SEQ_LEN, longest or ASSUMED_SEQ_LEN)
        num_examples = ASSUMED_EXAMPLES
    else:
        prepared = prepare(
            data,
            model=source,
            cache_dir=cache_dir,
            max_positions=longest,
            num_embeddings=model.vocab_size,
            trust_remote_code=trust_remote_code,
            **data_options,
        )
        chosen = seq_len or choose_seq_len(prepared, longest or prepared.train.longest).seq_len
        num_examples = prepared.train.num_examples
    return Task(
        model=model,
        data=prepared,
        seq_len=chosen,
        epochs=epochs,
        num_train_examples=max(1, round(epochs * num_examples)),
    )
