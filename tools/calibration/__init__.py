"""What pruning and quantization look at before they cut: ids to run, and the model layer by layer as it runs them."""

from __future__ import annotations

from .samples import Sampling, samples, spread, windows
from .streaming import Stage, stream

__all__ = ["Sampling", "Stage", "samples", "spread", "stream", "windows"]
