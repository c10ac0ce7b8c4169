"""Adapters: what a fine-tune changed, small and apart from the model. PEFT's and mlx-lm's folders in and out."""

from __future__ import annotations

from .adapter import Adapter, LowRank
from .attaching import Weighted, loras, replaced, soft_prompt
from .averaging import averaged, stacked
from .folders import adapter_format, base_of, read_adapter, write_adapter
from .merging import merged
from .modules import Modules

__all__ = [
    "Adapter",
    "LowRank",
    "Modules",
    "Weighted",
    "adapter_format",
    "averaged",
    "base_of",
    "loras",
    "merged",
    "read_adapter",
    "replaced",
    "soft_prompt",
    "stacked",
    "write_adapter",
]
