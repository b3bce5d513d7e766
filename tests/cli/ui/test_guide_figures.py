"""The guide's figures stand beside a plan of its model on its cards, and beside no other."""

from __future__ import annotations

import pytest
from rich.console import Console

from autosft.ui.guide_figures import NUM_PARAMETERS, beside_guide_2


@pytest.mark.parametrize(
    ("num_parameters", "device", "is_shown"),
    [
        (NUM_PARAMETERS, "A100-80GB", True),
        (NUM_PARAMETERS, "NVIDIA A100-SXM4-40GB", True),
        (NUM_PARAMETERS, "RTX-4090", False),
        (NUM_PARAMETERS - 1, "A100-80GB", False),
    ],
)
def test_only_for_its_model_on_its_cards(num_parameters: int, device: str, is_shown: bool) -> None:
    console = Console(width=140)
    with console.capture() as said:
        for part in beside_guide_2(num_parameters, device):
            console.print(part)
    assert ("55-65 GB" in said.get()) == is_shown
    assert ("14-20 h" in said.get()) == is_shown
