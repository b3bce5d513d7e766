"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

# Processes of ours do not look into the current folder for modules; what they run in tests stands there.
_ROOT = str(Path(__file__).parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))
