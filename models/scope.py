"""Names -> weights, and the one place where a LoRA adapter applies.

A `Scope` is a prefix into the model's weights ("layers.3.attn") with the operations that need a weight by name. It
knows nothing of shapes, caches or families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..backends.base import A, Backend, Routing, W


@dataclass(frozen=True)
class Lora:
    """One low-rank update of one weight: y += up . (down . x) * scale. down [r, I], up [O, r] (experts: [E, …]; an
    embedding: down [V, r], whose rows are looked up).

    gain [O]: DoRA (Liu et al. 2024): magnitude / norm of each row of the adapted weight, by which y is multiplied;
    shift [O]: added then, where the weight has a bias, which the gain must leave alone: bias * (1 - gain). dropout:
    what strikes x on its way to `down`, while training.
    """

    down: W
    up: W
    scale: float
    gain: A | None = None
    shift: A | None = None
    dropout: Callable[[A], A] | None = None


@dataclass(frozen=True)
class Scope:
    """weights: everything `prepare`d, by our names. trainable: arrays that stand in for weights while training (first
    argument of value_and_grad). loras: by the name of the weight that each adapts."""

    ops: Backend
    weights: Mapping[str, W]
    trainable: Mapping[str, A] = field(default_factory=dict)
    loras: Mapping[str, Sequence[Lora]] = field(default_factory=dict)
    listener: Callable[[str, A], None] | None = None
    eps: float = 1e-5
    norm_offset: float = 0.0
    ropes: Mapping[str, tuple[np.ndarray, float, bool]] = field(default_factory=dict)
    prefix: str = ""
    layer: int = -1

    def at(self, name: str, layer: int | None = None) -> Scope:
        """The scope one step down: `p.at("attn")`."""
        return Scope(
            self.ops, self.weights, self.trainable, self.loras, self.listener, self.eps, self.norm_offset, self.ropes,
            f"{self.prefix}{name}.", self.layer if layer is None else layer,
        )  # fmt: skip

    def weight(self, name: str) -> W:
        name = self.prefix + name
        found = self.trainable.get(name)
        return self.weights[name] if found is None else found

    def bias(self, name: str) -> W | None:
        name = f"{self.prefix}{name}.bias"
        found = self.trainable.get(name)
        return self.weights.get(name) if found is None else found

    def adapters(self, name: str) -> Sequence[Lora]:
        return self.loras.get(self.prefix + name, ())

    def tap(self, name: str, x: A) -> A:
        """Shows x to whoever listens, under its full name; returns x."""
        if self.listener:
            self.listener(self.prefix + name, x)
        return x

    def linear(self, name: str, x: A, weight: str | None = None) -> A:
        """weight: another's, where it is shared (a head that is the embedding); the adapters are those of `name`."""
        self.tap(f"{name}.input", x)
        y = self.ops.linear(x, self.weight(weight or name), self.bias(name))
        for a in self.adapters(name):
            y = y + self.ops.linear(self.ops.linear(a.dropout(x) if a.dropout else x, a.down), a.up) * a.scale
            y = y if a.gain is None else y * a.gain
            y = y if a.shift is None else y + a.shift
        return y

    def embed(self, name: str, ids: A) -> A:
        y = self.ops.embed(self.weight(name), ids)
        for a in self.adapters(name):
            y = y + self.ops.linear(self.ops.embed(a.down, ids), a.up) * a.scale
        return y

    def expert_linear(self, name: str, x: A, routing: Routing) -> A:
        self.tap(f"{name}.experts", routing.ids), self.tap(f"{name}.input", x)
        y = self.ops.expert_linear(x, self.weight(name), routing, self.bias(name))
        for a in self.adapters(name):
            down = self.ops.expert_linear(a.dropout(x) if a.dropout else x, a.down, routing)
            y = y + self.ops.expert_linear(down, a.up, routing) * a.scale
        return y

    def norm(self, name: str, x: A) -> A:
        return self.ops.rms_norm(x, self.weight(name), self.eps, self.norm_offset)
