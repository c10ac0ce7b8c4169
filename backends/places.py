"""A step as all layers of a device backend use it: where rows are written, and what their queries see.

Worked out once a step, on the host, from the step's NumPy arrays; the backends turn what comes out into their arrays.
"""

from __future__ import annotations

import numpy as np

from ..errors import ContextFull, Unsupported
from .base import AttentionSpec, Step
from .numerics import visible

CAUSAL = "causal"  # each query sees just everything up to itself; the last query is the last key's


class Places:
    """even: full rows, side by side in the cache, at one position; then a slice does for reading and writing."""

    def __init__(self, step: Step, tokens: int):
        self.step, self.tokens, self.rows = step, tokens, len(step.starts)
        self.end = max(int((step.starts + step.lengths).max(initial=0)), 1)  # of the longest row
        self.start = int(step.starts[0])
        self.slot = int(step.slots[0])
        self.together = bool((step.starts == self.start).all())
        side_by_side = bool((step.slots == self.slot + np.arange(self.rows)).all())
        self.even = self.together and side_by_side and bool((step.lengths == tokens).all())

    @property
    def slots(self) -> slice:
        """The rows' slots, when they are side by side."""
        return slice(self.slot, self.slot + self.rows)

    def check(self, capacity: int) -> None:
        """Raises ContextFull, or Unsupported for packed rows: a cache takes neither."""
        if self.step.segments is not None:
            raise Unsupported("Packed segments and a cache exclude each other.", "Give each document its own row.")
        if self.end > capacity:
            raise ContextFull(
                f"{self.end} tokens do not fit in a cache of {capacity}.", "Shorten the prompt or raise the context."
            )

    def real_tokens(self) -> tuple[np.ndarray, ...]:
        """Of every token that is no padding: its row, its place in the row, its slot and its position."""
        row, place = np.nonzero(np.arange(self.tokens) < self.step.lengths[:, None])
        return row, place, self.step.slots[row], self.step.starts[row] + place

    def first_seen(self, spec: AttentionSpec) -> int:
        """The first position in the cache that any query sees: what lies before need not be read."""
        if not self.even:
            return 0
        by_window = 0 if spec.window is None else self.start - spec.window + 1
        by_chunk = 0 if spec.chunk is None else self.start // spec.chunk * spec.chunk
        return max(0, by_window, by_chunk)

    def seen(self, spec: AttentionSpec, first: int, keys: int) -> np.ndarray | str | None:
        """Which keys each query sees: None for all, CAUSAL, or bool [B or 1, 1, T, keys]. The keys are those of the
        cache from position `first` on; without a cache, the rows themselves."""
        if self.step.cache is None:
            if self.tokens == 1:
                return None
            if self.step.segments is None and spec.chunk is None and (spec.window or keys) >= keys:
                return CAUSAL
        elif self.even:
            if self.tokens == 1:
                return None
            one_chunk = spec.chunk is None or first // spec.chunk == (self.end - 1) // spec.chunk
            if one_chunk and (spec.window or keys) >= keys:
                return CAUSAL
        alike = self.even and self.step.segments is None
        rows = [self._row_sees(spec, row, first, keys) for row in range(1 if alike else self.rows)]
        return np.stack(rows)[:, None]

    def _row_sees(self, spec: AttentionSpec, row: int, first: int, keys: int) -> np.ndarray:
        """bool [T, keys]. Padding sees everything: what comes of it counts for nothing, but must be finite."""
        step, queries = self.step, self.step.starts[row] + np.arange(self.tokens)
        where = queries if step.cache is None else first + np.arange(keys)
        segments = None if step.segments is None else (step.segments[row], step.segments[row])
        sees = visible(queries, where, spec, segments)
        sees[step.lengths[row] :] = True
        return sees


def causal(tokens: int, keys: int) -> np.ndarray:
    """CAUSAL written out, bool [1, 1, tokens, keys]"""
    return np.tri(tokens, keys, keys - tokens, dtype=bool)[None, None]
