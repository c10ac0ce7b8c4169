"""How much a model loses on text that none of the plans was shown.

That is how many nats more than the original's it takes to say the same text, for each token of the original. It
compares models that cut text differently; on a model's own words it is what the KL divergence is in the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from pathlib import Path

from ...runtime.session import open_session
from ..evaluate.text import Evaluation, evaluate
from ..progress import Progress

Told = Callable[[Progress], None]


@dataclass(frozen=True)
class Judge:
    """text: held out, `tokens` long for the original; window: tokens a window."""

    text: str
    tokens: int
    window: int

    def measured(self, folder: Path, name: str, told: Told) -> Evaluation:
        with open_session(folder, backend="cpu") as session:
            for event in evaluate(session, self.text, min(self.window, session.config.context)):
                if isinstance(event, Evaluation):
                    break
                told(Progress(f"{name}: measuring", event.done, event.total, "windows"))
        return event

    def loss(self, bits_per_byte: float, original: float) -> float:
        """Both in bits a byte."""
        return (bits_per_byte - original) * log(2) * len(self.text.encode()) / self.tokens
