"""What may be tried to bring a model down to a size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from ...models.config import MLPConfig, ModelConfig
from ...models.parameters import expected
from ..prune import Amount
from ..prune import Options as PruneOptions

HEAVY = 0.1  # of all parameters: embeddings from there on are worth cutting
FEW_BITS = 4  # a parameter, below which a smaller model of more bits may be better than all of it in fewer
DEEP = 10  # layers, from which on some can go


@dataclass(frozen=True)
class Plan:
    """What is pruned before bits are shared out. vocabulary: one token in so many stays. layers: that go. channels:
    share of the feed-forward's that go. healed: what is left is taught by the original; where nothing goes, the scales
    are once all is rounded."""

    vocabulary: int = 1
    layers: int = 0
    channels: float = 0.0
    healed: bool = False

    @property
    def name(self) -> str:
        said = [f"vocabulary / {self.vocabulary}"] if self.vocabulary > 1 else []
        said += [f"layers -{self.layers}"] if self.layers else []
        said += [f"channels -{self.channels:.0%}"] if self.channels else []
        return ", ".join((said or ["bits alone"]) + ["healed"] * self.healed)

    @property
    def parts(self) -> list[Plan]:
        """Plans of one kind of cut each, which make this one together."""
        several = Plan(self.vocabulary), Plan(layers=self.layers), Plan(channels=self.channels)
        return [part for part in several if part != BITS_ALONE]

    @property
    def kind(self) -> str:
        """Of a single cut: vocabulary, layers or channels."""
        return "vocabulary" if self.vocabulary > 1 else "layers" if self.layers else "channels"

    def pruning(self, vocab: int, tokens: int, length: int) -> PruneOptions:
        """As prune's options, for a model of `vocab` tokens."""
        return PruneOptions(
            vocabulary=Amount(vocab // self.vocabulary) if self.vocabulary > 1 else None,
            layers=Amount(self.layers) if self.layers else None,
            channels=Amount(share=self.channels) if self.channels else None,
            tokens=tokens,
            length=length,
            dequantize=True,
        )


BITS_ALONE = Plan()


def cuts(config: ModelConfig, target_bytes: int) -> list[Plan]:
    """Single cuts that promise something, the most promising first: what each loses is found out, the rest is put
    together from them. Tokens that hardly ever come cost least; with few bits a smaller model may be worth more."""
    parameters = sum(prod(shape) for shape in expected(config).values())
    heads = 1 if config.tied else 2
    found = []
    if heads * config.vocab * config.width >= HEAVY * parameters:
        found += [Plan(vocabulary=3), Plan(vocabulary=2)]
    few = 8 * target_bytes / parameters < FEW_BITS
    if few and len(config.layers) >= DEEP:
        found += [Plan(layers=n) for n in (max(1, len(config.layers) // 15), max(1, len(config.layers) // 30))]
    elif few and _plain(config):  # slower to choose, and costs more for as many parameters
        found += [Plan(channels=0.1)]
    return list(dict.fromkeys(found))


def _plain(config: ModelConfig) -> bool:
    """Whether all feed-forwards are of one size, as channels are cut alike, and a tenth of it makes a group."""
    sizes = {f.hidden for layer in config.layers if isinstance(f := layer.feed_forward, MLPConfig)}
    return len(sizes) == 1 and sizes.pop() >= 320


def together(parts: Sequence[Plan]) -> list[Plan]:
    """Every plan that single cuts make, at most one of a kind; bits alone is one of them."""
    vocabulary = [1, *(p.vocabulary for p in parts if p.vocabulary > 1)]
    layers = [0, *(p.layers for p in parts if p.layers)]
    channels = [0.0, *(p.channels for p in parts if p.channels)]
    return [Plan(*several) for several in product(vocabulary, layers, channels)]
