"""ondevice: small language models that run, shrink, learn and answer on your own machine.

Importing this package imports nothing heavy: backends, models and tools are loaded when they are used.
"""

from __future__ import annotations

import os.path  # and nothing that takes time: who interrupts before `__main__` sees a traceback

__version__ = "0.1.0"


def _check_links() -> None:
    """On Windows, a clone without `core.symlinks=true` leaves text files where the three links should be."""
    for name in ("backends", "models", "tools"):
        path = os.path.join(os.path.dirname(__file__), name)
        if os.path.isfile(path):
            raise ImportError(
                f"{path} should be a link to the folder {name}/ but is a text file.\n"
                "Clone again with: git -c core.symlinks=true clone …  (Windows: turn Developer Mode on first)"
            )


_check_links()


def open(model: str, **options):
    """Open a model for use from Python: a `Session` (see `ondevice.runtime.session.open_session` for the options)."""
    from .runtime.session import open_session

    return open_session(model, **options)


def available() -> dict[str, str]:
    """The backends that are ready here: name -> what each runs on."""
    from .registry import probe_backends

    return {name: probe.device for name, probe in probe_backends().items() if probe.ready}
