"""What a user's loss takes of RAM while it is traced cannot take the study with it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import pytest

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory import program_cache
from autosft.profiles.memory.batches import Batch
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.memory.trace.host_memory import bounded
from autosft.profiles.memory.trace.trace_errors import Untraceable
from autosft.profiles.user_code import find
from tests.profiles.memory.models import config_json, step_recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the data segment")

#: Untouched, so that only the limit counts it.
LOSS = """
import numpy
from torch.nn.functional import cross_entropy

def loss(outputs, labels, num_items_in_batch=None):
    held = numpy.empty({num_bytes}, dtype=numpy.uint8)
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return cross_entropy(logits.float(), labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
"""


def test_beyond_half_of_what_is_free_allocations_fail_and_afterwards_they_do_not() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    num_bytes = psutil.virtual_memory().available
    with pytest.raises(MemoryError), bounded():
        bytearray(num_bytes)
    with bounded():
        assert bytearray(1 << 20)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_lower_limit_of_the_users_stays() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 40, before[1]))
    try:
        with bounded():
            assert resource.getrlimit(resource.RLIMIT_DATA)[0] <= 1 << 40
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == 1 << 40
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.slow
@pytest.mark.parametrize(("share", "is_followed"), [(0.0, True), (2.0, False)])
def test_a_loss_that_takes_too_much_ram_is_not_followed_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, is_followed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"hungry_{is_followed}"
    num_bytes = int(share * psutil.virtual_memory().available)
    (tmp_path / f"{name}.py").write_text(LOSS.format(num_bytes=num_bytes))
    recipe = step_recipe(loss=find(f"{name}:loss", flag="--loss"))
    programs = program_cache.step_programs(
        config_json(), recipe, DeviceKind.CPU, None, trusted=False, cache_dir=None
    )
    batch = Batch(shape=Shape(batch=2, seq=40, scored=30), padded=True)
    if is_followed:
        assert programs.for_batch(batch)
        return
    with pytest.raises(Untraceable, match=rf"--loss {name}:loss \(line 6: .*more RAM than this process may"):
        programs.for_batch(batch)
