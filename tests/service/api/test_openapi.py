"""What OpenAPI says is what the service does: no made-up request makes it fail.

A few requests to each endpoint here; `python -m tests.service.api.fuzzing 10` is the long form.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.service.api.fakes import ROOT, client, served
from tests.service.api.fuzzing import filled, fuzz, operations


@pytest.mark.slow
def test_no_request_makes_it_fail(tmp_path: Path) -> None:
    with filled(tmp_path) as service:
        found = operations(service)
        assert len(found) > 25
        for operation in found:
            answered = fuzz(operation, num_examples=6)
            assert answered.total() > 0, operation.label


def test_every_endpoint_says_what_it_does_and_how_it_refuses(tmp_path: Path) -> None:
    with served(tmp_path, local_user=ROOT) as service:
        described = client(service).get("/openapi.json").json()
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description"), (method, path)
            assert "401" in operation["responses"], (method, path)
