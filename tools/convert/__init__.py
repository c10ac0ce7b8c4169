"""GGUF or Hugging Face in; a Hugging Face folder or a GGUF out: every tensor once, with everything the model needs.

GGUF's affine types (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0) keep their codes and scales, as MLX groups of 32, and come back from
there as they were. K-quants have no exact place in such a folder and go to a dense type that the user chooses; other
bits and groups go into the GGUF type that loses least, and what was lost is measured.
"""

from __future__ import annotations

from .estimating import Estimate, estimate
from .planning import Plan, convert, plan, plan_hf
from .to_gguf import GgufPlan, convert_gguf, plan_gguf

__all__ = ["Estimate", "GgufPlan", "Plan", "convert", "convert_gguf", "estimate", "plan", "plan_gguf", "plan_hf"]
