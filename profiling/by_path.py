"""Imported first by a script that is run by its path: not this folder, but the repository is searched first."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
