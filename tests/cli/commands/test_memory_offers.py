"""Where memory is too small a change is taken only when the user says so."""

from __future__ import annotations

import dataclasses

import pytest

from autosft.commands import memory_offers
from autosft.commands.memory_offers import with_offers
from autosft.profiles.errors import UserError
from autosft.profiles.recipe import Checkpointing, Sharding
from autosft.scheduler.decide.planner import DoesNotFitError
from autosft.scheduler.plan.forecast import Way
from autosft.scheduler.plan.remedies import Remedy, TooLittleMemoryError
from autosft.studies.request import TuneRequest
from tests.plans import memory_estimate
from tests.scheduler.devices import gpu
from tests.workers.small import settings

WAY = Way(
    micro_batch=1,
    gradient_accumulation=8,
    checkpointing=Checkpointing.OFF,
    sharding=Sharding.NONE,
    num_devices=1,
    memory=memory_estimate(),
    tokens_per_s=1000.0,
    run_s=3600.0,
    upper_run_s=5000.0,
    speed_basis="datasheet rates",
)
EIGHT_BIT = Remedy(
    change="--optimizer adamw_8bit",
    device="Some GPU",
    way=WAY,
    quality="none measurable",
    fields={"method": "full", "space": {"optimizer": "adamw_8bit"}},
)
LORA = Remedy(change="--method lora", device="Some GPU", way=WAY, quality="little", fields={"method": "lora"})
TWO_GPUS = Remedy(
    change="2 GPUs",
    device="Some GPU",
    way=dataclasses.replace(WAY, sharding=Sharding.FSDP, num_devices=2),
    quality="none",
    fields=None,
)
REQUEST = TuneRequest(model="m", data="d", method="full", space={"seq_len": 512})


class Work:
    """Fits only what is asked for with another method or optimizer."""

    def __init__(self, *offers: Remedy) -> None:
        self.offers, self.asked = offers, []

    def __call__(self, request: TuneRequest) -> str:
        self.asked.append(request)
        if request.method == "lora" or "optimizer" in request.space:
            return "done"
        cause = DoesNotFitError(
            "full needs 58 GiB: 19 GiB are missing.",
            remedy=None,
            smallest=memory_estimate(),
            settings=settings(),
            device=gpu(),
        )
        raise TooLittleMemoryError(cause, self.offers)


def at_a_terminal(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def write(self, _text: str) -> int:
            return 0

        def flush(self) -> None:
            return

    monkeypatch.setattr(memory_offers.sys, "stdin", Terminal())
    monkeypatch.setattr(memory_offers.sys, "stderr", Terminal())
    monkeypatch.setattr("rich.prompt.Prompt.ask", lambda *_, **__: answer)


def test_yes_takes_the_first_change_and_keeps_the_rest_of_the_request(capsys):
    work = Work(EIGHT_BIT, LORA)
    assert with_offers(REQUEST, True, work) == "done"
    assert work.asked[1].space == {"seq_len": 512, "optimizer": "adamw_8bit"}
    assert work.asked[1].method == "full"
    err = capsys.readouterr().err
    assert "19 GiB are missing" in err
    assert "Applied: --optimizer adamw_8bit" in err


@pytest.mark.parametrize(("answer", "method"), [("1", "full"), ("2", "lora"), ("y", "full")])
def test_a_terminal_is_asked(monkeypatch, answer, method):
    at_a_terminal(monkeypatch, answer)
    work = Work(EIGHT_BIT, TWO_GPUS, LORA)  # more GPUs cannot be taken: they are not in the list
    assert with_offers(REQUEST, None, work) == "done"
    assert work.asked[1].method == method


@pytest.mark.parametrize(
    ("name", "answer", "offers"),
    [("--no", False, (LORA,)), ("nobody to ask", None, (LORA,)), ("nothing to take", True, (TWO_GPUS,))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_is_taken_unasked(name, answer, offers):
    work = Work(*offers)
    with pytest.raises(UserError, match="19 GiB are missing") as caught:
        with_offers(REQUEST, answer, work)
    assert len(work.asked) == 1
    assert offers[0].change in str(caught.value)
    assert "usual loss of quality" in str(caught.value)


def test_none_of_the_offers_may_be_taken(monkeypatch):
    at_a_terminal(monkeypatch, "n")
    with pytest.raises(TooLittleMemoryError):
        with_offers(REQUEST, None, Work(LORA))


def test_other_errors_are_not_asked_about():
    def wrong(_request: TuneRequest) -> str:
        raise UserError("no such file")

    with pytest.raises(UserError, match="no such file"):
        with_offers(REQUEST, True, wrong)
