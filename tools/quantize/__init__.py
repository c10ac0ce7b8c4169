"""A model in fewer bits: a Hugging Face folder in MLX's convention, with what is lost lost where it matters least."""

from __future__ import annotations

from .options import METHODS, Options
from .running import Progress, quantize
from .weighing import Given
from .writing import Result

__all__ = ["METHODS", "Given", "Options", "Progress", "Result", "quantize"]
