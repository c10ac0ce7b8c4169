"""Is a Python package really here? Asked by backends' probes, which must not import it to find out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def hidden_by(distribution: str, module: str) -> str | None:
    """What `import module` would find instead of the distribution's own package: a folder or file of the same name
    earlier on the path. None when the right one would be imported."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return "nothing at all"
    home = Path(importlib.metadata.distribution(distribution).locate_file(module)).resolve()
    found = [Path(p).resolve() for p in spec.submodule_search_locations or [spec.origin or ""]]
    return None if home in found or home in found[0].parents else str(found[0])
