"""Errors that the command line shows without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """The request is invalid or cannot be served: shown as one message without a traceback, exit code 2.

    The message gives the value, the bound that it violates and its place (file and line for data); the remedy
    tells the user what to do.
    """

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message}\n{self.remedy}"


class MissingExtraError(UserError):
    """An optional part of autosft is needed but not installed."""

    def __init__(self, *, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs the optional part '{extra}', which is not installed.",
            remedy=f"Install it with: pip install 'autosft[{extra}]'",
        )


class StudyFailedError(Exception):
    """The work itself keeps failing: exit code 1."""


class InterruptedRunError(StudyFailedError):
    """What the work needs has died under it, such as Ray: the same command goes on later; exit code 75."""


class StorageError(OSError):
    """Storage at a URL cannot be reached, or denies access."""
