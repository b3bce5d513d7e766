"""A request is checked before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.studies.request import read_request


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("studies", "studies"),
        (Path("/shared/studies"), "/shared/studies"),
        ("file:///shared/studies", "/shared/studies"),
        (Path("s3://bucket/studies"), "s3://bucket/studies"),
        ("gs://bucket/studies/", "gs://bucket/studies"),
    ],
)
def test_checkpoints_go_to_a_folder_or_a_url(output: str | Path, expected: str) -> None:
    assert read_request({"output": output}, None).output == expected


def test_a_password_is_not_written_into_records() -> None:
    with pytest.raises(UserError, match="password"):
        read_request({"output": "sftp://me:secret@host/studies"}, None)


SIZES = {"20GB": 20 * 10**9, "1.5 GiB": 3 << 29, "500m": 5 * 10**8, ".5GB": 5 * 10**8, "7": 7}


@pytest.mark.parametrize(("text", "num_bytes"), SIZES.items())
def test_sizes_are_read_as_they_are_written(text: str, num_bytes: int) -> None:
    assert read_request({"disk_budget": text}, None).disk_budget == num_bytes


@pytest.mark.parametrize("text", ["20 apples", "0GB", "-3", "1.2.3GB", "1,000MB", "20GB of disk", ""])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a positive size"):
        read_request({"disk_budget": text}, None)
