"""A model in fewer bits: a Hugging Face folder in MLX's convention, with what is lost lost where it matters least."""

from __future__ import annotations

from .options import METHODS, Options
from .running import Progress, quantize
from .writing import Result

__all__ = ["METHODS", "Options", "Progress", "Result", "quantize"]
