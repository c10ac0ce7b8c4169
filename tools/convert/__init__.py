"""GGUF or Hugging Face in, a Hugging Face folder out: every tensor once, with everything the model needs beside it.

GGUF's affine types (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0) keep their codes and scales, as MLX groups of 32; K-quants have no
exact place in such a folder and go to a dense type that the user chooses.
"""

from __future__ import annotations

from .estimating import Estimate, estimate
from .planning import Plan, convert, plan

__all__ = ["Estimate", "Plan", "convert", "estimate", "plan"]
