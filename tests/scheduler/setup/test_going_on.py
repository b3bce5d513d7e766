"""A study that is gone on with says where its trials do, and not its whole plan again."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from autosft.scheduler.setup.open_study import going_on_lines
from autosft.studies.store.records import open_records
from autosft.studies.trial import TrialState
from tests.studies.study_examples import end, evaluation, opened, start

PLAN = (
    "Model: tiny, 1,000 parameters.",
    "Device: AMD EPYC, 20 GiB free.",
    "Memory: needs 100 MiB.",
    "12 trials, 2 at once.",
    "Time budget 3 h: no trial starts that would not end in it.",
    "Expected end: in about 1 h (predicted).",
)


def test_a_line_for_each_trial_that_goes_on(tmp_path: Path) -> None:
    with closing(open_records(f"sqlite:///{tmp_path}/studies.db")) as records:
        study = opened(records)
        for number, state in enumerate((TrialState.COMPLETED, TrialState.WAITING, TrialState.WAITING)):
            study.ask(now=0.0)
            start(study, number)
            if number < 2:  # a folder that cannot be seen is taken to be resumable
                checkpoint = str(tmp_path / f"gone-{number}")
                study.record(evaluation(number, 1, 2, checkpoint=checkpoint), now=1.0)
            study.end_attempt(end(number, 1), state, now=2.0)
        study.ask(now=3.0)  # and has not begun
        lines = going_on_lines(study, PLAN)
        num_steps = study.trial(1).settings.num_train_examples // study.trial(1).settings.effective_batch_size
    assert lines == (
        "Device: AMD EPYC, 20 GiB free.",
        "Time budget 3 h: no trial starts that would not end in it.",
        f"trial 1 resumes at step 21 of {num_steps}",
        "trial 2 starts over: it has no checkpoint",
    )
