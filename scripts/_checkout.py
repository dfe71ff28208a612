"""Puts the repository root first on sys.path, so that `import merge` finds the package and not scripts/merge.py.

Python puts the folder of the script that it runs first; with that alone, `merge` would be the script itself. Inserted, not
replaced: worker processes started by a script still have to find this module.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
