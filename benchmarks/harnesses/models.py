"""Configurations of the models that published rows name."""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from typing import Any

from harnesses.prediction import NotPredictable


@functools.cache
def _known() -> dict[str, dict[str, Any]]:
    text = files("autosft.profiles.data").joinpath("models.json").read_text(encoding="utf-8")
    table = {}
    for model in json.loads(text)["models"]:
        for name in (model["name"], *model["repositories"]):
            table[name.lower()] = model["config"]
    return table


def config_json(model_id: str) -> str:
    """Return the transformers configuration of a model by its hub name; raises NotPredictable."""
    config = _known().get(model_id.lower())
    if config is None:
        raise NotPredictable(f"no configuration of {model_id} is at hand")
    return json.dumps(config)
