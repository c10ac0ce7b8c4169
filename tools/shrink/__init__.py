"""A model made to fit a size: ways to prune and quantize it are tried on a text, and the best is kept."""

from __future__ import annotations

from .options import Options
from .running import Outcome, Result, shrink

__all__ = ["Options", "Outcome", "Result", "shrink"]
