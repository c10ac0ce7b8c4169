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
class Gains:
    """What DoRA does to a weight's outputs y = W x, once its norms are known: y * rest + z * gain is added, z the
    low-rank part; shift, where the weight has a bias, keeps it out of that. All [O]."""

    gain: A
    rest: A
    shift: A | None = None


@dataclass(frozen=True)
class Lora:
    """One low-rank update of one weight: y += up . (down . x) * scale. down [r, I], up [O, r] (experts: [E, …]; an
    embedding: down [V, r], whose rows are looked up).

    With `magnitude` [O] (DoRA, Liu et al. 2024) the rows of W + scale * up . down are brought to these lengths; their
    norms are taken at each pass, for training, and `bias` [O] must stand beside it where the weight has one. With
    `gains` that has been worked out before. Either holds for linear maps; an embedding's gains [D] are by column.
    dropout: what strikes x on its way to `down`, while training.
    """

    down: W
    up: W
    scale: float
    magnitude: A | None = None
    bias: A | None = None
    gains: Gains | None = None
    dropout: Callable[[A], A] | None = None

    @property
    def plain(self) -> bool:
        """Whether this is LoRA and nothing more."""
        return self.magnitude is None and self.gains is None and self.dropout is None


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
    norms: str = "rms"  # as ModelConfig.norm

    def at(self, name: str, layer: int | None = None) -> Scope:
        """The scope one step down: `p.at("attn")`."""
        return Scope(
            self.ops, self.weights, self.trainable, self.loras, self.listener, self.eps, self.norm_offset, self.ropes,
            f"{self.prefix}{name}.", self.layer if layer is None else layer, self.norms,
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
        w, adapters = self.weight(weight or name), self.adapters(name)
        if len(adapters) == 1 and adapters[0].plain:
            a = adapters[0]
            return self.ops.adapted_linear(x, w, self.bias(name), a.down, a.up, a.scale)
        base = y = self.ops.linear(x, w, self.bias(name))
        for a in adapters:
            h = self.ops.linear(a.dropout(x) if a.dropout else x, a.down)
            z = self.ops.linear(_scaled(h, a), a.up)
            y = y + self._change(base, z, a.gains or self._gains(w, a))
        return y

    def embed(self, name: str, ids: A) -> A:
        base = y = self.ops.embed(self.weight(name), ids)
        for a in self.adapters(name):
            z = self.ops.linear(_scaled(self.ops.embed(a.down, ids), a), a.up)
            y = y + self._change(base, z, a.gains)
        return y

    def _change(self, base: A, z: A, gains: Gains | None) -> A:
        """What an adapter adds to `base`, which is the weight's own answer; z: the low-rank answer."""
        if gains is None:
            return z
        change = base * gains.rest + z * gains.gain
        return change if gains.shift is None else change + gains.shift

    def _gains(self, weight: W, a: Lora) -> Gains | None:
        if a.magnitude is None:
            return None
        gain = a.magnitude * self.ops.inverse_norm(weight, a.down, a.up, a.scale)
        rest = gain + -1.0
        return Gains(gain, rest, None if a.bias is None else a.bias * rest * -1.0)

    def expert_linear(self, name: str, x: A, routing: Routing) -> A:
        self.tap(f"{name}.experts", routing.ids), self.tap(f"{name}.input", x)
        y = self.ops.expert_linear(x, self.weight(name), routing, self.bias(name))
        for a in self.adapters(name):
            down = self.ops.expert_linear(a.dropout(x) if a.dropout else x, a.down, routing)
            y = y + self.ops.expert_linear(_scaled(down, a), a.up, routing)
        return y

    def norm(self, name: str, x: A) -> A:
        if self.norms == "rms":
            return self.ops.rms_norm(x, self.weight(name), self.eps, self.norm_offset)
        bare = self.ops.layer_norm(x, None, None, self.eps) if self.norm_offset or self.norms == "bare" else None
        if self.norms == "bare":
            return bare
        y = self.ops.layer_norm(x, self.weight(name), self.bias(name), self.eps)
        return y if bare is None else y + bare * self.norm_offset


def _scaled(h: A, a: Lora) -> A:
    """The scale is applied where an adapter is narrow: r numbers a token instead of all outputs."""
    return h if a.scale == 1.0 else h * a.scale
