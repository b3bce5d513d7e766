"""The planner's process: imports what plans once, then answers one question a line.

    python -m autosft.service.requests.planner_process HARDWARE STORAGE

Standard input has JSON lines `{"id", "kind", ...}`, standard output the answers `{"id", "answer"}` or
`{"id", "error"}`; it ends when its input does.  What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any

READY = {"ready": True}


def main(hardware: str, storage: str) -> None:
    """Answer until the input ends."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        _warm_up()
        _say(out, READY)
        for line in sys.stdin:
            _say(out, _answer(json.loads(line), hardware, storage))


def _warm_up() -> None:
    """Import now what the first question would wait for."""
    from autosft.scheduler.setup.open_study import import_heavy_modules
    from autosft.service.requests import fits, predict  # noqa: F401

    import_heavy_modules()


def _answer(question: dict[str, Any], hardware: str, storage: str) -> dict[str, Any]:
    from autosft.profiles.errors import UserError
    from autosft.service.requests import fits, predict
    from autosft.service.values import Arguments
    from autosft.studies.wire import from_plain, to_plain

    number = question["id"]
    try:
        if question["kind"] == "fits":
            answer = fits.answer(fits.Question(**question["fits"]), hardware, storage)
        else:
            answer = to_plain(
                predict.predict(from_plain(Arguments, question["arguments"]), hardware, storage)
            )
    except UserError as error:
        return {"id": number, "error": str(error)}
    except Exception as error:  # a bug of ours, or of a library on this input: the server goes on
        print(f"{question['kind']} failed", file=sys.stderr)  # noqa: T201
        sys.excepthook(type(error), error, error.__traceback__)
        said = " ".join(str(error).split())[:300]
        return {"id": number, "failure": f"{type(error).__name__}: {said}"}
    return {"id": number, "answer": answer}


def _say(out: IO[str], value: object) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
