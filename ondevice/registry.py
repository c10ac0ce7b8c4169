"""Plug-ins: which backends and families exist, which are ready here, and which one to take.

Both kinds are entry points (`ondevice.backends`, `ondevice.families`), our own and a third party's alike. A backend's
face (`Plugin`) is cheap to import; the heavy module is loaded by `Plugin.create` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from . import installed
from .errors import BadOption, Unavailable


@dataclass(frozen=True)
class Probe:
    """What a backend says of itself here, found cheaply: ready or not, why, and what to do about it."""

    ready: bool
    reason: str = ""  # why not (or a caveat when ready), one line
    hint: str = ""  # how to get it, one line
    device: str = ""  # what it runs on, for people
    priority: int = 0  # the ready backend with the highest one is the default

    @classmethod
    def available(cls, device: str, priority: int, reason: str = "", hint: str = "") -> Probe:
        return cls(True, reason, hint, device, priority)

    @classmethod
    def missing(cls, reason: str, hint: str) -> Probe:
        return cls(False, reason, hint)


@dataclass(frozen=True)
class Plugin:
    """A backend's face: `probe()` is quick and imports nothing heavy; `create(**options)` does the work."""

    name: str
    probe: Callable[[], Probe]
    create: Callable[..., Any] = field(repr=False)


MANY = 100  # names that a person would still read through


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean …?` for a near miss, else the list of what is known; of a long one the few that are most alike."""
    import difflib

    known = sorted(known)
    if close := difflib.get_close_matches(word, known, n=1, cutoff=0.6):
        return f"Did you mean {close[0]!r}?"
    if len(known) > MANY:
        alike = difflib.get_close_matches(word, known, n=5, cutoff=0)
        return f"Of {len(known)} that are known, the most alike: {', '.join(alike)}."
    return f"Known: {', '.join(known) or 'none'}."


def _load(group: str, kind: str, name: str):
    entries = installed.entry_points(group)
    if name not in entries:
        raise BadOption(f"There is no {kind} named {name!r}.", did_you_mean(name, entries))
    return entries[name].load()


def backend_names() -> list[str]:
    return sorted(installed.entry_points("ondevice.backends"))


def probe_backends() -> dict[str, Probe]:
    """Every backend known, probed; a plug-in that breaks on import or probing is reported, never raised."""
    probes = {}
    for name in backend_names():
        try:
            probes[name] = _load("ondevice.backends", "backend", name).probe()
        except Exception as error:  # a third party's plug-in may fail in any way; it must not take the others down
            probes[name] = Probe.missing(f"its plug-in failed: {type(error).__name__}: {error}", "update or remove it")
    return probes


def create_backend(name: str | None = None, **options):
    """The backend called `name`, or the best one that is ready.

    Raises BadOption for an unknown name, Unavailable (with the reason and the remedy) for one that is not ready.
    """
    if name is None:
        ready = {n: p for n, p in probe_backends().items() if p.ready}
        name = max(ready, key=lambda n: ready[n].priority)
    plugin = _load("ondevice.backends", "backend", name)
    probe = plugin.probe()
    if not probe.ready:
        raise Unavailable(f"The backend {name} is not available here: {probe.reason}.", probe.hint)
    return plugin.create(**options)


@cache
def _families() -> tuple[dict[str, Any], dict[str, str]]:
    loaded, broken = {}, {}
    for name in sorted(installed.entry_points("ondevice.families")):
        try:
            loaded[name] = _load("ondevice.families", "family", name)
        except Exception as error:  # as above: one broken plug-in must not take the others down
            broken[name] = f"{type(error).__name__}: {error}"
    return loaded, broken


def families() -> dict[str, Any]:
    """Every model family that is ready: name -> Family."""
    return _families()[0]


def broken_families() -> dict[str, str]:
    """The families whose plug-in does not load: name -> why."""
    return _families()[1]
