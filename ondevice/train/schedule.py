"""How high the learning rate stands at a step."""

from __future__ import annotations

import math

from .settings import Settings


def warmup_steps(settings: Settings, steps: int) -> int:
    """A number of steps as it was given, or a share of all."""
    return round(settings.warmup * steps) if settings.warmup < 1 else min(round(settings.warmup), steps)


def rate_at(settings: Settings, step: int, steps: int) -> float:
    """step: from 1 to `steps`. Rises evenly over the warmup, then stays, or falls to 0 behind the last step: evenly
    or along half a cosine (Loshchilov and Hutter 2017)."""
    warmup = warmup_steps(settings, steps)
    if step <= warmup:
        return settings.rate * step / (warmup + 1)
    done = (step - 1 - warmup) / max(1, steps - warmup)
    if settings.schedule == "constant":
        return settings.rate
    return settings.rate * (1 - done if settings.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)
