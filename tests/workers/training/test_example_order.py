"""The examples of a run are read from the prepared files as they are: nothing is copied for a trial."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from autosft.workers.training.example_order import order_examples
from tests.workers import small


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_trials_of_a_node_share_the_pages_of_the_prepared_data(tmp_path: Path) -> None:
    data = small.make_data(tmp_path / "data")
    files = {str(path) for path in (data / "train").glob("*.arrow")}
    before = {str(path) for path in tmp_path.rglob("*")}
    job = small.job(tmp_path / "model", data, tmp_path / "output")
    course = order_examples(job)
    assert len(course.dataset[: course.num_steps * 8]["input_ids"]) == course.num_steps * 8
    mapped = [item for item in psutil.Process().memory_maps(grouped=False) if item.path in files]
    assert {item.path for item in mapped} == files, "the files are mapped"
    assert sum(item.rss for item in mapped) > 0
    assert sum(item.anonymous for item in mapped) == 0, "and no page of them is a copy"
    assert {str(path) for path in tmp_path.rglob("*")} == before, "nothing was written for the trial"
