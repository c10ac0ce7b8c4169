"""`compile`: a decode step recorded once as a CUDA graph and replayed, so that a token costs one launch.

What changes from token to token (ids, starts, lengths) lies in buffers on the device that the recorded kernels read.
Fixed are the rows, their slots and how many positions of the cache attention looks at; that number grows in steps of
ROOM, each with a recording of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..base import Step
from ..places import Places
from .attention import DevicePlaces

if TYPE_CHECKING:
    from .backend import CudaBackend

ROOM = 256  # positions
KEPT = 8  # recordings


class Replay:
    """fn(ids, step) -> tensor, by recording. Steps of several tokens a row, or without a cache, go to fn itself.

    capture False runs the recorded form without recording it: the same arithmetic, on any device.
    """

    def __init__(self, ops: CudaBackend, fn: Callable, capture: bool):
        self.ops, self.fn, self.capture = ops, fn, capture
        self.recordings: dict[tuple, Recording] = {}

    def __call__(self, ids: torch.Tensor, step: Step) -> torch.Tensor:
        if ids.shape[1] != 1 or step.cache is None:
            return self.fn(ids, step)
        places = Places(step, 1)
        places.check(step.cache.capacity)
        room = min(-(-places.end // ROOM) * ROOM, step.cache.capacity)
        key = id(step.cache), step.slots.tobytes(), room
        if key not in self.recordings:
            while len(self.recordings) >= KEPT:
                del self.recordings[next(iter(self.recordings))]
            self.recordings[key] = Recording(self.ops, self.fn, ids, step, room, self.capture)
        return self.recordings[key](ids, step)


class Recording:
    """One step for one cache (which it keeps alive), fixed slots and a fixed room."""

    def __init__(self, ops: CudaBackend, fn: Callable, ids: torch.Tensor, step: Step, room: int, capture: bool):
        self.ops, self.fn = ops, fn
        self.step = Step(step.starts, step.lengths, step.slots, cache=step.cache)
        self.ids = ids.clone()
        self.numbers = torch.zeros((2, len(step.starts)), dtype=torch.int32, device=ids.device)
        self.places = DevicePlaces(self.step, room, *self.numbers)
        self._set(ids, step)
        self.graph = torch.cuda.CUDAGraph() if capture else None
        if capture:
            self._record()

    def _record(self) -> None:
        """Run once beside the main stream, as torch asks for, so that libraries set themselves up; then record."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._run()
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self.graph):
            self.result = self._run()

    def _set(self, ids: torch.Tensor, step: Step) -> None:
        self.ids.copy_(ids)
        self.numbers.copy_(torch.from_numpy(np.stack([step.starts, step.lengths])))

    def _run(self) -> torch.Tensor:
        self.places.forget()
        with self.ops.at(self.places):
            return self.fn(self.ids, self.step)

    def __call__(self, ids: torch.Tensor, step: Step) -> torch.Tensor:
        self._set(ids, step)
        if self.graph is None:
            return self._run()
        self.graph.replay()
        return self.result
