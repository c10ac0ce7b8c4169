"""What a shrinking is asked for. Defaults live here; the command line takes them from here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import BadOption


@dataclass(frozen=True)
class Options:
    """target_bytes: of all weights, at most. minutes: no plan is begun that would end later, judging by the longest so
    far; the first always runs. calibration: a text or .jsonl; None: what the model itself says, drawn with `seed`;
    `tokens` of it, `length` a window, of which the last `held_out` share judges the plans and is shown to none."""

    target_bytes: int
    minutes: float = 30.0
    calibration: Path | None = None
    tokens: int = 6144
    length: int = 512
    held_out: float = 0.25
    seed: int = 0

    def __post_init__(self):
        if self.target_bytes <= 0:
            raise BadOption(f"A model of {self.target_bytes} bytes is none.", "Give a size such as 60MB.")
        if self.minutes <= 0:
            raise BadOption(f"--budget {self.minutes:g} leaves no time.", "Give minutes, such as 30.")
