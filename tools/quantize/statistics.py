"""What flows into each linear map, summed up as E[x x^T] while it flows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class Inputs:
    """A listener for one stage of a stream. Maps that read the same array share their sums; of stacks of experts the
    inputs themselves are kept, for as many sums as there are experts would not fit. sized: `size` will be asked for."""

    def __init__(self, sized: bool = False):
        self._sized = sized
        self._sums: dict[str, np.ndarray] = {}
        self._sizes: dict[str, np.ndarray] = {}
        self._counts: dict[str, int] = {}
        self._same_as: dict[str, str] = {}
        self._routed: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._experts: np.ndarray | None = None  # ids [N, k], told before the input that they are for
        self._flowing: dict[str, np.ndarray] = {}  # by map, of the batch that flows now: what no map before it has read

    def __call__(self, name: str, x: np.ndarray) -> None:
        name, _, kind = name.rpartition(".")
        if kind == "experts":
            self._experts = np.array(x)
        elif kind == "input" and self._experts is not None:
            self._routed.setdefault(name, []).append((np.array(x), self._experts))
            self._experts = None
        elif kind == "input":
            self._add(name, x.reshape(-1, x.shape[-1]))

    def _add(self, name: str, x: np.ndarray) -> None:
        if name in self._flowing:  # another batch begins
            self._flowing = {}
        same = next((first for first, read in self._flowing.items() if np.array_equal(read, x)), None)
        if same:
            self._same_as[name] = same
            return
        self._flowing[name] = x
        if name not in self._sums:
            self._sums[name], self._sizes[name] = np.zeros((x.shape[1],) * 2), np.zeros(x.shape[1])
        self._sums[name] += x.T @ x
        if self._sized:
            self._sizes[name] += np.abs(x).sum(0)
        self._counts[name] = self._counts.get(name, 0) + len(x)

    def __contains__(self, name: str) -> bool:
        """Whether the map was seen at work."""
        return self.source(name) in self._sums or name in self._routed

    def source(self, name: str) -> str:
        """The map whose sums `name` shares: its own, or the first that read the same array."""
        return self._same_as.get(name, name)

    def gram(self, name: str) -> np.ndarray:
        """E[x x^T], float64 [I, I]."""
        name = self.source(name)
        return self._sums[name] / self._counts[name]

    def size(self, name: str) -> np.ndarray:
        """E|x|, float64 [I], where it was to be `sized`."""
        name = self.source(name)
        return self._sizes[name] / self._counts[name]

    def readers(self, name: str) -> list[str]:
        """All maps that read what `name` reads."""
        source = self.source(name)
        return [source, *(other for other, first in self._same_as.items() if first == source)]

    def expert_grams(self, name: str, experts: int) -> Iterator[tuple[int, np.ndarray]]:
        """For each expert: how many tokens it was given, and E[x x^T] of those (zeros where there was none)."""
        for expert in range(experts):
            rows = [_given(x, ids, expert) for x, ids in self._routed[name]]
            count = sum(map(len, rows))
            total = sum((part.T @ part).astype(np.float64) for part in rows)
            yield count, total / max(count, 1)


def _given(x: np.ndarray, ids: np.ndarray, expert: int) -> np.ndarray:
    """Rows that went to an expert: of x [N, I], or of x [N, k, I] in the expert's own place; ids [N, k]."""
    chosen = ids == expert
    return x[chosen] if x.ndim == 3 else x[chosen.any(-1)]
