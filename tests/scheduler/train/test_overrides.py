"""Another effective batch for an exported configuration: the learning rate follows as asked, or not."""

from __future__ import annotations

import pytest

from autosft.profiles.errors import UserError
from autosft.scheduler.train.overrides import LearningRateScaling, with_batch
from tests.workers.small import settings

BEFORE = settings(learning_rate=5e-5, effective_batch_size=8)


@pytest.mark.parametrize(
    ("scaling", "batch", "rate"), [("linear", 16, 1e-4), ("sqrt", 32, 1e-4), ("none", 16, 5e-5)]
)
def test_the_learning_rate_follows_the_batch(scaling: str, batch: int, rate: float) -> None:
    changed = with_batch(BEFORE, batch, LearningRateScaling(scaling))
    assert (changed.effective_batch_size, changed.learning_rate) == (batch, pytest.approx(rate))
    assert changed.num_train_examples == BEFORE.num_train_examples


def test_nothing_changes_unasked() -> None:
    assert with_batch(BEFORE, None, LearningRateScaling.NONE) is BEFORE


@pytest.mark.parametrize(
    ("batch", "scaling", "words"),
    [
        (None, "linear", "has nothing to scale with"),
        (0, "none", "0 is not between 1 and the 64 examples"),
        (65, "none", "65 is not between 1 and the 64 examples"),
    ],
)
def test_what_makes_no_sense_is_refused(batch: int | None, scaling: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        with_batch(BEFORE, batch, LearningRateScaling(scaling))
