"""`compile`: one pass through the model written down as kernel calls, then replayed without the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base import A, SamplingParams, Step
from ..tape import Array
from . import _native

if TYPE_CHECKING:
    from .backend import CpuBackend


class NotRecordable(Exception):
    """Something happened while recording that a replay would not repeat; says what."""


class Recording:
    """A plan being written: native calls are appended instead of run, so the arrays hold nothing yet."""

    def __init__(self) -> None:
        self.plan = _native.Plan()
        self.kept: list[Any] = []  # what the plan points to
        self.tables: dict[Any, np.ndarray] = {}  # rotary positions, by what they were made from
        self.moved: dict[tuple, np.ndarray] = {}  # what the host makes of each step, by rule and arguments
        self.last: tuple[np.ndarray, _native.Activations] | None = None  # activations made int8 last

    def moving(self, rule: Callable[..., np.ndarray], step: Step, *rest: Any) -> np.ndarray:
        """rule(step, *rest); `refresh` brings it up to date."""
        key = (rule, *rest)
        if key not in self.moved:
            self.moved[key] = rule(step, *rest)
        return self.moved[key]

    def refresh(self, step: Step) -> None:
        """Before a replay: what the kernels read is worked out again."""
        for (rule, *rest), kept in self.moved.items():
            np.copyto(kept, rule(step, *rest))

    def keep(self, arguments: tuple) -> None:
        """Results in the plan's own arena need no keeping: they are reused once the recording lets go of them."""
        self.kept += [a for a in arguments if not (isinstance(a, np.ndarray) and self.plan.owns(a))]


class Replayed:
    """`fn(ids, step)` for one shape and one cache, through a plan; eagerly, and openly so, where that can't be."""

    def __init__(self, backend: CpuBackend, fn: Callable[[A, Step], A]):
        self.backend, self.fn = backend, fn
        self.key: tuple | None = None
        self.reason = ""  # why there is no plan

    def __call__(self, ids: Array, step: Step) -> Array:
        if not self._ready(ids, step):
            return self.fn(ids, step)
        self.backend.machine.replay(self.recording.plan)
        return self.result

    def burst(
        self, ids: Array, step: Step, params: SamplingParams, u: np.ndarray, stop: Collection[int] = ()
    ) -> np.ndarray | None:
        """Without the interpreter in between; None where the host has a part in every step."""
        if not self._ready(ids, step) or self.recording.moved or params.top_logprobs:
            return None
        p, (ids_read, starts_read) = params, self.inputs[:2]
        last = Step(step.starts + np.int32(len(u) - 1), step.lengths, step.slots, cache=step.cache)
        if step.cache is not None:
            step.cache.check(last)
        filters, stops = (p.temperature, p.top_k, p.top_p, p.min_p), np.fromiter(stop, np.int32, len(stop))
        drawn = np.empty(len(u), np.int32)
        plan, logits = self.recording.plan, self.result.data
        count = self.backend.machine.burst(plan, ids_read, starts_read, logits, *filters, u, stops, drawn)
        return drawn[:count]

    def _ready(self, ids: Array, step: Step) -> bool:
        """Whether there is a plan for these, which has now been given them."""
        if self.reason or step.segments is not None or self.backend.recording_gradients:
            return False
        key = (ids.shape, step.cache, len(step.starts))  # the cache itself: nothing else can come to have its id
        if key != self.key:
            self.key = None
            self._record(ids, step)
            if self.reason:
                return False
            self.key = key
        if step.cache is not None:
            step.cache.check(step)
        for kept, given in zip(self.inputs, (ids.data, step.starts, step.lengths, step.slots), strict=True):
            kept[...] = given
        self.recording.refresh(step)
        self.backend.kernels.arena.tidy()  # what the prompt took is the cache's to fill
        return True

    def _record(self, ids: Array, step: Step) -> None:
        """The step's arrays are replaced by copies of our own, which the kernels read again at each replay."""
        kernels = self.backend.kernels
        self.inputs = [np.array(a, np.int32) for a in (ids.data, step.starts, step.lengths, step.slots)]
        fixed = Step(*self.inputs[1:], cache=step.cache)
        self.recording = Recording()
        kernels.recording, self.backend.machine.plan = self.recording, self.recording.plan
        try:
            self.result = self.fn(Array(self.backend, self.inputs[0]), fixed)
        except NotRecordable as error:
            self.reason = str(error)
        finally:
            kernels.recording = self.backend.machine.plan = None
        self.backend.compiled = self.reason or f"a plan of {len(self.recording.plan)} kernel calls"
        self.recording.last = None
        self.recording.tables.clear()
