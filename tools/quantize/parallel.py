"""Work on several pieces at once: NumPy lets go of the interpreter where it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ...machine import cores

T, R = TypeVar("T"), TypeVar("R")


def side_by_side(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """work of each, on all the cores that this process may use."""
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(work, items))
