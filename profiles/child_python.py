"""Start Python subprocesses without importing modules from the current folder.

`python -m` and `python -c` look for modules in the current folder first: there a user's `datasets.py`,
`queue.py` or `random.py` would shadow the real module.  The user's own code (`--loss`, `--trainer`) is found
by `user_code`, which searches that folder deliberately.
"""

from __future__ import annotations

import sys


def python(*arguments: str) -> list[str]:
    """Return a command that runs this interpreter without the current folder on its path.

    `arguments` are those of `python`: "-m", a module, and its arguments.
    """
    return [sys.executable, "-P", *arguments]
