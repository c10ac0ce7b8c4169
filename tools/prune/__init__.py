"""A model with less in it: tokens, layers, channels, heads, experts or single weights that it can do without."""

from __future__ import annotations

from ..progress import Progress
from ..teaching import Lessons
from .events import Result, Score, Scores, Size
from .options import SPARSE, Amount, Options, Sparsity
from .running import prune

__all__ = [
    "SPARSE", "Amount", "Lessons", "Options", "Progress", "Result", "Score", "Scores", "Size", "Sparsity", "prune",
]  # fmt: skip
