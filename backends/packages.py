"""Is a Python package really here? Asked by backends' probes, which must not import it to find out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..installed import folder_of, version

__all__ = ["hidden_by", "version"]


def hidden_by(distribution: str, module: str) -> str | None:
    """What `import module` would find instead of an installed distribution's own package: a folder or file of the same
    name earlier on the path. None when the right one would be imported."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return "nothing at all"
    home = (Path(folder_of(distribution)).parent / module).resolve()
    found = [Path(p).resolve() for p in spec.submodule_search_locations or [spec.origin or ""]]
    return None if home in found or home in found[0].parents else str(found[0])
