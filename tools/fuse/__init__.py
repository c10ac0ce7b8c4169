"""A model and its adapters made one: a Hugging Face folder that says what both said, or nothing at all."""

from __future__ import annotations

from .drift import Drift, drift
from .fusing import Fused, Measured, Options, Progress, fuse

__all__ = ["Drift", "Fused", "Measured", "Options", "Progress", "drift", "fuse"]
