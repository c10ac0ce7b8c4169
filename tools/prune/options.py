"""What a pruning is asked for. Defaults live here; the command line takes them from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ...errors import BadOption
from ..teaching import Lessons

SPARSE = {  # method -> one line of help
    "sparsegpt": "by what a weight's loss costs once the others have made up for it (slower, better)",
    "wanda": "by weight times the size of what it meets",
    "magnitude": "by weight alone; needs no calibration",
}


SHARES = {"--target": "a share, such as 20%", "--sparsity": "a share or N:M, such as 50% or 2:4"}  # what takes no count


@dataclass(frozen=True)
class Amount:
    """How much: a count, or a share of what there is."""

    count: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str, option: str) -> Amount:
        """'3' or '10%'. Raises BadOption."""
        try:
            if text.endswith("%"):
                share = float(text[:-1]) / 100
                if math.isfinite(share) and 0 < share < 1:
                    return cls(share=share)
            elif option not in SHARES and int(text) > 0:
                return cls(count=int(text))
        except ValueError:
            pass
        takes = SHARES.get(option, f"a count or a share, such as {option} 3 or 10%")
        raise BadOption(f"{option} {text} makes no sense.", f"Give {takes}.")

    def of(self, total: int) -> int:
        """At least one."""
        return self.count if self.share is None else max(1, round(self.share * total))


@dataclass(frozen=True)
class Sparsity:
    """A share of weights to be zero; n:m leaves n of every m neighbours (2:4 is what some GPUs are quick with)."""

    share: float
    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, text: str) -> Sparsity:
        """'50%' or '2:4'. Raises BadOption."""
        n, colon, m = text.partition(":")
        if colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m) <= 64:
            return cls(1 - int(n) / int(m), int(n), int(m))
        return cls(Amount.parse(text, "--sparsity").share)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.m else f"{self.share:.0%}"


@dataclass(frozen=True)
class Options:
    """What is to go. target: a share of all parameters, of whatever costs least; or vocabulary: tokens that stay;
    keep_vocabulary: a text whose tokens stay. layers: whole layers to go, chosen here, or drop_layers: these. channels,
    heads, experts: of each layer. sparsity: of the matrices that are left in place.

    method: of sparsity. calibration: a text or .jsonl; None: what the model itself says, drawn with `seed`; `tokens`
    of it are run, `length` a window. repair: what stays is changed to make up for what goes. dequantize: take weights
    that are quantized as what they stand for. heal: teach what is left, on `backend`; None:
    leave it.
    """

    target: Amount | None = None
    vocabulary: Amount | None = None
    keep_vocabulary: Path | None = None
    layers: Amount | None = None
    drop_layers: tuple[int, ...] = ()
    channels: Amount | None = None
    heads: Amount | None = None
    experts: Amount | None = None
    sparsity: Sparsity | None = None
    method: str = "sparsegpt"
    calibration: Path | None = None
    tokens: int = 4096
    length: int = 512
    seed: int = 0
    repair: bool = True
    dequantize: bool = False
    heal: Lessons | None = None
    backend: str = "cpu"

    def __post_init__(self):
        if self.method not in SPARSE:
            raise BadOption(f"There is no method {self.method!r}.", f"Choose from {', '.join(SPARSE)}.")
        if self.vocabulary and self.keep_vocabulary:
            raise BadOption("--vocabulary and --keep-vocabulary say two things.", "Give one of them.")
        if self.layers and self.drop_layers:
            raise BadOption("--layers and --drop-layers say two things.", "Give one of them.")
        if self.target and (self.sparsity or self.named):
            raise BadOption("--target chooses what goes: nothing else can be named.", "Give --target alone.")
        if self.target and self.target.share is None:
            raise BadOption(f"--target {self.target.count} makes no sense.", "Give a share, such as --target 20%.")
        if self.sparsity and self.heal:
            raise BadOption("What is healed does not stay zero.", "Use --sparsity without --heal.")
        if self.sparsity and self.structured:
            raise BadOption("--sparsity goes alone.", "Prune in two steps: first the structure, then --sparsity.")
        if not (self.structured or self.sparsity):
            raise BadOption(
                "Nothing is asked for.",
                "Give --target, --vocabulary, --layers, --channels, --heads, --experts or --sparsity.",
            )

    @property
    def structured(self) -> bool:
        return bool(self.target) or self.named

    @property
    def named(self) -> bool:
        """Whether it is said which parts go."""
        named = (self.vocabulary, self.keep_vocabulary, self.layers, self.drop_layers)
        return any((*named, self.channels, self.heads, self.experts))
