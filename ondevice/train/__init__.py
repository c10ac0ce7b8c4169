"""Teaching a model: LoRA and its kin, full and prompt tuning; next tokens, preferences, a teacher. See docs/train.md.

for event in train(session, load_data("data.jsonl", session, 512), Settings(steps=100), "adapter"): ...
"""

from __future__ import annotations

from .data import Data, Example, load_data
from .encode import Encoded
from .events import Event, Finished, Saved, Started, StepDone, Validating
from .loop import Saving, train
from .settings import Settings

__all__ = [
    "Data", "Encoded", "Event", "Example", "Finished", "Saved", "Saving", "Settings", "Started", "StepDone",
    "Validating", "load_data", "train",
]  # fmt: skip
