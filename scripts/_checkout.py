"""The first import of every script: puts the repository root first on sys.path, and Ctrl-C in one line.

`import merge` has to find the package and not scripts/merge.py: Python puts the folder of the script that it runs first.
Inserted, not replaced: worker processes started by a script still have to find this module.
"""

import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def _quiet(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line where Ctrl-C comes while a script is still importing; everything else as ever."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped; nothing was written", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _quiet
