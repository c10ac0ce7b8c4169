"""What a shrinking is asked for. Defaults live here; the command line takes them from here."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

from ...errors import BadOption


@dataclass(frozen=True)
class Options:
    """target_bytes: of all weights, at most. minutes: nothing is begun that would end later, judging by how long the
    like of it took, and what is under way is dropped then; there is always a model. calibration: a text or .jsonl;
    None: what the model itself says, drawn with `seed`; `tokens` of it, `length` a window (None: 512, but 256 of its
    own text), of which the last `held_out` share judges the plans and is shown to none. requantize:
    take weights that are quantized already for what they stand for."""

    target_bytes: int
    minutes: float = 30.0
    calibration: Path | None = None
    tokens: int = 8192
    length: int | None = None
    held_out: float = 0.25
    seed: int = 0
    requantize: bool = False

    def __post_init__(self):
        if self.target_bytes <= 0:
            raise BadOption(f"A model of {self.target_bytes} bytes is none.", "Give a size such as 60MB.")
        if not 0 < self.minutes < inf:
            raise BadOption(f"--budget {self.minutes:g} is no time to work in.", "Give minutes, such as 30.")

    @property
    def window(self) -> int:
        """Tokens of a calibration window."""
        return self.length or (512 if self.calibration else 256)
