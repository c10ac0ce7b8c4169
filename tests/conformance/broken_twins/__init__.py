"""Backends that are the reference but for one mistake, the kind that happens when one writes a backend.

`@twin(area)` takes a class: of kernels, of a cache, or of a backend. `area` is the module of cases that must notice.
"""

from __future__ import annotations

from collections.abc import Callable

from ondevice.backends.reference import NumpyKernels, ReferenceBackend

TWINS: dict[str, tuple[str, Callable[[], ReferenceBackend]]] = {}  # name -> area, how to make it


def twin(area: str) -> Callable[[type], type]:
    def register(kind: type) -> type:
        TWINS[kind.__name__] = (area, lambda: _make(kind))
        return kind

    return register


def _make(kind: type) -> ReferenceBackend:
    if issubclass(kind, ReferenceBackend):
        return kind(NumpyKernels())
    if issubclass(kind, NumpyKernels):
        return ReferenceBackend(kind())
    backend = ReferenceBackend(NumpyKernels())
    backend.new_cache = lambda specs, slots, capacity, dtype=None: kind(specs, slots, capacity, dtype or "float32")
    return backend


from . import contract, experts, forward, keeping, recurrence, sampling, seeing, training  # noqa: E402, F401  (they register)
