"""What guide 2 says of Llama-2-7B on A100s, to stand beside a plan of the same; nothing is decided by it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from autosft.ui.tables import new_table

#: Llama-2-7B's, as the guide prints it.
NUM_PARAMETERS = 6_738_415_616
HEADINGS = ("method", "trained", "memory", "1 GPU", "2 GPUs", "4 GPUs", "saved")
FIGURES = (
    ("full", "100 %", "55-65 GB", "24-36 h", "14-20 h", "8-12 h", "13 GB"),
    ("lora", "4 M", "20 GB", "12 h", "7 h", "", "16 MB"),
)
WHERE_IT_IS_WRONG = (
    "Its 13 + 26 + 13 GB are 16-bit weights, moments and gradients; here they are fp32, twice as much.",
    "Its 3 epochs are of about 2,900 blocks of 1,024 tokens, not 30,000: 24 h would be 103 tokens/s.",
    "It calls a 40 GB card usable at 55-65 GB.",
)


def beside_guide_2(num_parameters: int, device_name: str) -> Iterator[RenderableType]:
    """Yield the guide's table and remarks where the plan is of its model and its cards."""
    if num_parameters != NUM_PARAMETERS or "A100" not in device_name:
        return
    table = new_table()
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in FIGURES:
        table.add_row(*row)
    yield ""
    yield Text("The same by a hand-written guide (full fine-tuning at length 1,024, batch 8)", style="bold")
    yield table
    yield from (f"  {remark}" for remark in WHERE_IT_IS_WRONG)
