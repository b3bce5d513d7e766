"""What `autosft train` goes on from: whole checkpoints, and the evaluations of attempts before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from autosft.scheduler.events import Note, StudyEvent
from autosft.scheduler.train.run_state import EVALUATIONS, keep_evaluation, kept_evaluations, last_checkpoint
from autosft.studies.files.checkpoints import checkpoint_dir, install
from tests.studies.study_examples import evaluation


def checkpoint(folder: Path, step: int) -> Path:
    staged = folder / "staged"
    staged.mkdir()
    (staged / "model.safetensors").write_bytes(bytes(range(256)))
    final = checkpoint_dir(folder, step)
    install(staged, final)
    return final


def test_a_checkpoint_with_a_flipped_byte_is_not_resumed_from_and_that_is_reported(tmp_path: Path) -> None:
    said: list[StudyEvent] = []
    first, last = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    assert last_checkpoint(tmp_path, said.append) == last
    assert said == []
    weights = last / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    assert last_checkpoint(tmp_path, said.append) == first
    [note] = said
    assert isinstance(note, Note)
    assert "step-000020" in note.message
    assert "sha256 differs" in note.message


def test_evaluations_of_earlier_attempts_are_kept_up_to_where_the_next_continues(tmp_path: Path) -> None:
    assert kept_evaluations(tmp_path, up_to=100) == []
    first, second, third = (evaluation(0, 1, number, 2.0 / number) for number in (1, 2, 3))
    for item in (first, second, third):
        keep_evaluation(tmp_path, item)
    again = dataclasses.replace(second, attempt=2)
    keep_evaluation(tmp_path, again)  # by an attempt that went on from the first
    with (tmp_path / EVALUATIONS).open("a") as file:
        file.write('{"trial": 0, "atte')  # and was killed
    assert kept_evaluations(tmp_path, up_to=third.step) == [first, again, third]
    assert kept_evaluations(tmp_path, up_to=second.step) == [first, again]
    assert kept_evaluations(tmp_path, up_to=0) == []
