"""Numbers as a language writes them: 67.2% in English, 67,2% in Portuguese. The page's script does the same
with the same mark."""

from __future__ import annotations

MARKS = {"en": ".", "pt": ","}


def decimal(value: float, language: str, places: int = 2) -> str:
    return f"{value:.{places}f}".replace(".", MARKS[language])


def percent(value: float, language: str, places: int = 1) -> str:
    """A share of one."""
    return f"{decimal(100 * value, language, places)}%"
