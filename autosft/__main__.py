"""`python -m autosft` is `autosft`."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `-m` puts the current folder first on the path, where a user's queue.py would be taken for Python's.
    del sys.path[0]

from autosft.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
