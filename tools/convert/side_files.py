"""What a model needs beside its weights stands in the runtime, which training shares."""

from __future__ import annotations

from ...runtime.side_files import SAMPLING, side_files

__all__ = ["SAMPLING", "side_files"]
