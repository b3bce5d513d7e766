"""`python -m autosft` is `autosft`."""

from autosft.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
