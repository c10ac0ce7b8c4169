"""Products over packed weights in Triton, for a few tokens: the codes are read once and never written out as numbers.

Many tokens go the other way (`weights.PackedWeight`): unpacked piece by piece, then torch's own product, whose tensor
cores outweigh the writing. Where Triton is missing, few tokens do as well.
"""

from __future__ import annotations

import os

import torch

try:
    import triton
except ImportError:
    triton = None

MOST_TOKENS = 4  # each reads the weight again (from the second on mostly out of the cache)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on the CPU, for tests


def serves(x: torch.Tensor) -> bool:
    """Is there a kernel for x [..., I]?"""
    return triton is not None and (x.is_cuda or INTERPRETED) and x.numel() <= MOST_TOKENS * x.shape[-1]
