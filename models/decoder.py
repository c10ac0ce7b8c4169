"""The decoder: ids in, logits out; the same few lines for every family and every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..backends.base import A, Backend, Cache, Step, W
from .block import block
from .config import ModelConfig
from .scope import Lora, Scope


@dataclass(frozen=True)
class SoftPrompt:
    """Embeddings of no token's, [tokens, D], in front of every sequence (Lester et al. 2021)."""

    embeddings: W
    tokens: int

    @property
    def ids(self) -> list[int]:
        """What stands for them in front of the ids of a sequence; which ids these are makes no difference."""
        return [0] * self.tokens


class Decoder:
    """A model made of prepared weights. Callable as a whole, or as `embed`, `block(i)`, `head`, so that tools can
    stream layer by layer. `listener` is shown every tapped activation; while there is one, nothing is compiled. With a
    `soft` prompt, whoever makes sequences puts `front` before their ids.

    length: how many tokens its caches hold at most, by which some rotary positions are chosen; None: few."""

    def __init__(self, config: ModelConfig, ops: Backend, weights: Mapping[str, W], length: int | None = None):
        self.config, self.ops, self.weights = config, ops, weights
        self.loras: Mapping[str, Sequence[Lora]] = {}
        self.soft: SoftPrompt | None = None
        self.listener: Callable[[str, A], None] | None = None
        self.ropes = {name: (*rope.frequencies(length), rope.interleaved) for name, rope in config.ropes.items()}

    @property
    def front(self) -> list[int]:
        """What every sequence begins with: the places of a soft prompt, if there is one."""
        return self.soft.ids if self.soft else []

    def scope(
        self, trainable: Mapping[str, A] | None = None, loras: Mapping[str, Sequence[Lora]] | None = None
    ) -> Scope:
        """trainable: arrays in the place of weights; loras: adapters in the place of those attached."""
        cfg = self.config
        return Scope(
            self.ops,
            self.weights,
            trainable or {},
            self.loras if loras is None else loras,
            self.listener,
            cfg.norm_eps,
            cfg.norm_offset,
            self.ropes,
            norms=cfg.norm,
        )

    def embed(self, p: Scope, ids: A, step: Step | None = None) -> A:
        """ids [B, T] -> what the first block reads, [B, T, D]; step None: whole rows from position 0."""
        step = step or Step.whole(*ids.shape)
        x = self.look_up(p, ids)
        return self.enter(p, x if self.soft is None else self._softened(self.soft, x, step), step)

    def look_up(self, p: Scope, ids: A) -> A:
        """ids [B, T] -> their embeddings, [B, T, D]: in their places others may stand, that are no token's."""
        x, scale = p.embed("embed", ids), self.config.embed_scale
        return x if scale == 1.0 else x * scale

    def enter(self, p: Scope, x: A, step: Step) -> A:
        """Embeddings [B, T, D], whosever they are -> what the first block reads."""
        if self.config.positions:
            x = x + p.embed("positions", self.ops.positions(step, x.shape[1]))
        return x if self.config.input_scale == 1.0 else x * self.config.input_scale

    def _softened(self, soft: SoftPrompt, x: A, step: Step) -> A:
        """x [B, T, D] with the soft prompt in the places that are its own; both are made everywhere and struck out
        where they don't belong, as no operation joins arrays."""
        at = step.starts[:, None] + np.arange(x.shape[1], dtype=np.int32)
        if (at >= soft.tokens).all():
            return x
        theirs = self.ops.embed(soft.embeddings, self.ops.array(np.minimum(at, soft.tokens - 1)))
        share = (at < soft.tokens).astype(np.float32)[..., None]
        return x * self.ops.array(1 - share) + theirs * self.ops.array(share)

    def block(self, p: Scope, i: int, x: A, step: Step) -> A:
        return block(p.at(f"layers.{i}", i), self.config.layers[i], x, step)

    def head(self, p: Scope, x: A) -> A:
        """x [..., D] -> logits [..., V]"""
        shared = self.config.tied and "head" not in self.weights  # an adapter may bring a head of its own
        logits = p.linear("head", p.norm("norm", x), weight="embed" if shared else None)
        scale, cap = self.config.logit_scale, self.config.logit_softcap
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else p.ops.softcap(logits, cap)

    def hidden(self, ids: A, step: Step, trainable: Mapping[str, A] | None = None) -> A:
        """ids [B, T] -> what the last block says, [B, T, D]; fills the cache on the way."""
        p = self.scope(trainable)
        x = self.embed(p, ids, step)
        for i in range(len(self.config.layers)):
            x = self.block(p, i, x, step)
        return x

    def __call__(
        self, ids: A, step: Step, rows: np.ndarray | None = None, trainable: Mapping[str, A] | None = None
    ) -> A:
        """ids [B, T] -> logits [B, T, V]; or, with `rows` (indices into the B * T places), [len(rows), V] of those."""
        x = self.hidden(ids, step, trainable)
        if rows is not None:
            x = self.ops.take(x.reshape(-1, self.config.width), rows)
        p = self.scope(trainable)
        return p.tap("logits", self.head(p, x))

    def new_cache(self, slots: int, capacity: int, dtype: str | None = None) -> Cache:
        return self.ops.new_cache(self.config.caches, slots, capacity, dtype)
