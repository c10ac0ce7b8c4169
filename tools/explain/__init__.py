"""How a model reads a text and arrives at the next token, for people who want to understand it: what `explain` gathers,
the words that it needs, and the page that shows it."""

from __future__ import annotations

from .explaining import Explanation, Progress, explain, positions_of

__all__ = ["Explanation", "Progress", "explain", "positions_of"]
