"""Twins and small files are made where the models and readers are tested."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("models", "files")]
