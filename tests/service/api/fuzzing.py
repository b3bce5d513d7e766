"""Requests made up from OpenAPI, and what every answer has to be.

python -m tests.service.api.fuzzing MINUTES      (the long form)
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from autosft.service.api.context import Service
from tests.service.api.fakes import FITS, HOST, ROOT, client, prediction, run, served
from tests.service.api.studies import example_study

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
#: A stream does not end.
LEFT_OUT = ("/events",)


@contextmanager
def filled(folder: Path) -> Iterator[Service]:
    """A service with a study that runs and has results, and one that waits."""
    with served(folder, local_user=ROOT) as service:
        by = client(service)
        number = by.post("/studies", json={"name": "study"}).json()["id"]
        by.post("/studies", json={"name": "next"})
        run(service, service.queue.get(number))
        example_study(service.records, service.limits.outputs / "root")
        service.planner.answers = lambda question: (
            FITS if question["kind"] == "fits" else prediction(refusal="it fits nowhere")
        )
        yield service


def operations(service: Service) -> list[Any]:
    """Return what OpenAPI describes."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", client(service).app, headers={"Host": HOST})
    found = [result.ok() for result in schema.get_all_operations()]
    return [operation for operation in found if operation.path not in LEFT_OUT]


def fuzz(operation: Any, *, num_examples: int, number: int = 0) -> Counter[int]:
    """Send made-up requests to one operation; return how often each status was answered.

    Raises an ExceptionGroup of what an answer was not.
    """
    statuses: Counter[int] = Counter()

    @seed(number)
    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        answer = case.call(headers={"Host": HOST})
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    check()
    return statuses


def main(minutes: float) -> int:
    """Fuzz every operation again and again; print what was answered, return how many failed."""
    logging.disable()
    total: Counter[int] = Counter()
    failed: dict[str, str] = {}
    until = time.monotonic() + 60 * minutes
    number = 0
    with tempfile.TemporaryDirectory() as folder, filled(Path(folder)) as service:
        while time.monotonic() < until:
            for operation in operations(service):
                try:
                    total += fuzz(operation, num_examples=40, number=number)
                except BaseExceptionGroup as group:
                    failed.setdefault(operation.label, "\n".join(map(str, group.exceptions))[:1500])
                except Exception as error:
                    failed.setdefault(operation.label, str(error)[:1500])
            number += 1
    print(f"{number} rounds, {total.total():,} requests: {dict(sorted(total.items()))}")
    for label, said in failed.items():
        print(f"FAILED {label}\n{said}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
