"""A model made to fit a size: ways to prune and quantize it are tried on a text, and the best is kept."""

from __future__ import annotations

from .events import Estimate, Outcome, Result
from .options import Options
from .running import shrink

__all__ = ["Estimate", "Options", "Outcome", "Result", "shrink"]
