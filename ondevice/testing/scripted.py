"""A decoder that says what it is told to: for tests of everything above the model (engine, chat, server).

It runs on the reference backend and has no weights. It remembers what went through it, so that a test can tell which
tokens were computed and which were reused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..backends.base import A, Backend, Cache, Step, W
from ..backends.reference import create as create_reference

Script = Callable[[Sequence[int]], "int | np.ndarray"]  # all ids so far -> the next id, or logits [V]
SURE = 20.0  # the logit of the id that comes next; the others have 0


@dataclass(frozen=True)
class ScriptedConfig:
    """What programs above a model ask of its config."""

    vocab: int
    width: int
    context: int = 1 << 20


class ScriptedDecoder:
    """script: from the ids so far (the cache's and the new ones, up to each place) to what comes next.

    `passes` has the ids of each forward pass, padding left out; `held` those that each slot holds now.
    """

    front: Sequence[int] = ()

    def __init__(self, script: Script, vocab: int = 64, ops: Backend | None = None):
        self.script = script
        self.ops = ops or create_reference()
        self.config = ScriptedConfig(vocab, width=vocab)
        self.weights: Mapping[str, W] = {}
        self.passes: list[list[int]] = []
        self.held: dict[int, list[int]] = {}

    @classmethod
    def saying(cls, prompt: int, answer: Sequence[int], vocab: int = 64) -> ScriptedDecoder:
        """Behind a prompt of `prompt` tokens comes `answer`, its last id for ever."""
        return cls(lambda ids: answer[min(max(len(ids) - prompt, 0), len(answer) - 1)], vocab)

    def new_cache(self, slots: int, capacity: int, dtype: str | None = None) -> Cache:
        return self.ops.new_cache([], slots, capacity, dtype)

    def hidden(self, ids: A, step: Step, trainable: Mapping[str, A] | None = None) -> A:
        """ids [B, T] -> [B, T, V]: the logits themselves, so that `head` has nothing to do."""
        rows = self.ops.numpy(ids)
        logits = np.zeros((*rows.shape, self.config.vocab), np.float32)
        for row, (start, n, slot) in enumerate(zip(step.starts, step.lengths, step.slots, strict=True)):
            new = rows[row, :n].tolist()
            before = self.held.get(int(slot), [])[:start] if step.cache is not None else []
            self.held[int(slot)] = before + new
            self.passes.append(new)
            for t in range(n):
                said = self.script([*before, *new[: t + 1]])
                if np.ndim(said):
                    logits[row, t] = said
                else:
                    logits[row, t, int(said)] = SURE
        return self.ops.array(logits)

    def head(self, p: object, x: A) -> A:
        return x

    def scope(self, trainable: Mapping[str, A] | None = None) -> None:
        """There are no names to look up."""

    def __call__(
        self, ids: A, step: Step, rows: np.ndarray | None = None, trainable: Mapping[str, A] | None = None
    ) -> A:
        logits = self.hidden(ids, step)
        return logits if rows is None else self.ops.take(logits.reshape(-1, self.config.vocab), rows)
