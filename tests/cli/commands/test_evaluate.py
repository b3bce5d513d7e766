"""What `autosft evaluate` makes of the checkpoints that it is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autosft.commands.evaluate import base_of

ADAPTER = {"base_model_name_or_path": "/models/base"}
FOLDERS = {
    "an adapter": ({"adapter_config.json": ADAPTER}, "/models/base"),
    "a model": ({"config.json": {}}, None),
    "a model beside an adapter": ({"config.json": {}, "adapter_config.json": ADAPTER}, None),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_an_adapters_data_is_read_as_its_base_model_reads_it(case: str, tmp_path: Path) -> None:
    files, expected = FOLDERS[case]
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert base_of(str(tmp_path)) == (expected or str(tmp_path))


def test_a_hub_id_is_its_own_base() -> None:
    assert base_of("someone/model") == "someone/model"
