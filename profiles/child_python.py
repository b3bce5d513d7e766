"""Starts Python processes of ours so that no file of the current folder is taken for a module.

`python -m` and `python -c` look for modules in the current folder first: a user's `datasets.py`, `queue.py`
or `random.py` there would be imported in place of what it is named after.  The user's own code (`--loss`,
`--trainer`) is found by `user_code`, which looks there on purpose.
"""

from __future__ import annotations

import sys


def python(*arguments: str) -> list[str]:
    """Return the command of a process with this interpreter, without the current folder on its path.

    `arguments` as of `python`: "-m", a module, and its arguments.
    """
    return [sys.executable, "-P", *arguments]
