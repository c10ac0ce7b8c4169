"""What may be tried to bring a model down to a size, the most promising first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from ...models.config import ModelConfig
from ...models.parameters import expected
from ..prune import Amount
from ..prune import Options as PruneOptions

HEAVY = 0.1  # of all parameters: an embedding from there on is worth cutting


@dataclass(frozen=True)
class Plan:
    """name: for people. cuts: what is pruned before bits are shared out, as prune's options; none: bits alone."""

    name: str
    cuts: Mapping[str, Amount] = field(default_factory=dict)

    def pruning(self, calibration: Path, tokens: int, length: int) -> PruneOptions:
        return PruneOptions(**self.cuts, calibration=calibration, tokens=tokens, length=length)


def proposals(config: ModelConfig, target_bytes: int) -> list[Plan]:
    """With many bits to share, cutting the vocabulary costs least; with few, a smaller model of more bits may be
    better than all of it in fewer."""
    parameters = sum(prod(shape) for shape in expected(config).values())
    bits = 8 * target_bytes / parameters
    heads = 1 if config.tied else 2
    plans = [Plan("bits alone")]
    tokens = Plan("vocabulary / 3", {"vocabulary": Amount(config.vocab // 3)})
    if heads * config.vocab * config.width >= HEAVY * parameters:
        plans.append(tokens)
        plans.append(Plan("vocabulary / 2", {"vocabulary": Amount(config.vocab // 2)}))
        if bits < 4 and len(config.layers) >= 10:
            plans.insert(2, Plan("vocabulary / 3, layers -7%", {**tokens.cuts, "layers": Amount(share=0.07)}))
            plans.append(Plan("vocabulary / 3, channels -10%", {**tokens.cuts, "channels": Amount(share=0.1)}))
    if bits < 4 and len(config.layers) >= 10:
        plans.append(Plan("layers -7%", {"layers": Amount(share=0.07)}))
    return plans
