"""A request is checked before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.studies.request import read_request


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("studies", Path("studies")),
        ("/shared/studies", Path("/shared/studies")),
        ("file:///shared/studies", Path("/shared/studies")),
        (Path("s3://bucket/studies"), "not to s3 storage"),
        ("gs://bucket/studies", "not to gs storage"),
    ],
)
def test_checkpoints_go_to_a_folder(output: str | Path, expected: Path | str) -> None:
    if isinstance(expected, Path):
        assert read_request({"output": output}, None).output == expected
    else:
        with pytest.raises(UserError, match=expected):
            read_request({"output": output}, None)
