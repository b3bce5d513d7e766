"""What cannot train without padding says so before anything is traced."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.memory.padding_free import require_padding_free
from autosft.profiles.model.profile import load_model_profile


@dataclass(frozen=True)
class Case:
    name: str
    model: str = "Llama-2-7b"
    adapter: str = "lora"
    longest: int = 4096
    has_own_code: bool = False
    refused: str = ""


CASES = [
    Case("Llama"),
    Case("an adapter over its layers", adapter="ia3"),
    Case("examples within the window", model="Mistral-7B-v0.1", longest=4096),
    Case("examples beyond it", model="Mistral-7B-v0.1", longest=4097, refused="sees 4096 at a time"),
    Case("no window", model="Mistral-7B-v0.3", longest=32_000),
    Case("some layers with one", model="Gemma-3-1b", longest=1024, refused="sees 512 at a time"),
    Case("eager attention", model="Gemma-2-2b", longest=64, refused="has eager attention only"),
    Case("a prompt", adapter="prefix_tuning", refused="its prompt before the first example"),
    Case("own code", has_own_code=True, refused="expect one row per example"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_cannot_be_the_same_experiment_is_refused(case: Case) -> None:
    model = load_model_profile(case.model, need_tokenizer=False, need_weights=False)
    expected = (
        pytest.raises(UserError, match=f"--padding-free: .*{case.refused}") if case.refused else nullcontext()
    )
    with expected:
        require_padding_free(
            model, adapter=case.adapter, longest=case.longest, has_own_code=case.has_own_code
        )
