"""Progress bars on stderr: the only ones, since a command's stderr escapes what moves a cursor.

`autosft.ui.terminal.guarded_output` writes control characters of anybody's text visibly; a bar draws with
them deliberately, and so goes to the stream behind, with its own text escaped.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(what: str = "", *, is_quiet: bool = False, **options: Any) -> tqdm[Any]:
    """Return a tqdm bar that is shown only where a person looks on, and is gone when it is done.

    `options` are tqdm's: total, unit and so on.
    """
    from tqdm import tqdm

    return tqdm(
        desc="".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in what) or None,
        file=getattr(sys.stderr, "unguarded", sys.stderr),
        disable=True if is_quiet else None,
        leave=False,
        dynamic_ncols=True,
        **options,
    )


__all__ = ["progress_bar"]
