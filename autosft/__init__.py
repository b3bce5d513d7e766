"""autosft: what fits, what learns best and which checkpoint to keep, on the GPUs you have.

Importing this package imports neither torch nor ray nor optuna.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the sub-packages (autosft.profiles, ...) are next to this folder; if installed, in it.  A
# process that starts at the checkout's root takes the package from here, whatever is installed.
_here = Path(__file__).resolve().parent
if not (_here / "profiles").is_dir() and (_here.parent / "pyproject.toml").is_file():
    __path__.append(str(_here.parent))
