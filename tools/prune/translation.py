"""Between a vocabulary and the part of it that was kept: how the whole model teaches one that knows fewer tokens.

A token that went is now said piece by piece. Where the two ways of cutting a text meet, what follows is the same text:
there the first piece's probability is the sum over all tokens that would begin with it. Within the pieces of a token
the whole model has no prediction of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from ...backends.base import A, Step
from ...runtime.tokenizer import Tokenizer
from ...train.batches import Batch
from ...train.learner import Taught, Teacher

NOTHING = np.float32(-1e4)  # the logit of what cannot be said


class Translation:
    """old, new: tokenizers before and after; kept: the old id of each new one."""

    def __init__(self, old: Tokenizer, new: Tokenizer, kept: np.ndarray):
        self.old, self.new, self.kept = old, new, kept
        self.firsts = self._firsts()
        self.order = np.flatnonzero(self.firsts >= 0)
        self.order = self.order[np.argsort(self.firsts[self.order], kind="stable")]
        self.said, self.starts = np.unique(self.firsts[self.order], return_index=True)

    def _firsts(self) -> np.ndarray:
        """For each old token the new one that now begins it, int32 [V]; -1 for what is no text by itself."""
        firsts = np.full(self.old.vocab_size, -1, np.int32)
        stays = self.kept[self.kept < len(firsts)]
        for id in np.setdiff1d(np.arange(len(firsts)), stays).tolist():
            text = self.old.bytes_of(id).decode("utf-8", "replace")
            if text and "\ufffd" not in text:
                firsts[id] = next(iter(self.new.encode_plain(text, False)), -1)
        firsts[stays] = np.flatnonzero(self.kept < len(firsts))
        return firsts

    def restored(self, ids: Sequence[int]) -> list[int]:
        """New ids -> the old ones of the same text, as the original cuts it; where that is no text, piece by piece."""
        made: list[int] = []
        for special, part in groupby(ids, self.new.special_ids.__contains__):
            part = list(part)
            made += self.kept[part].tolist() if special else self._recut(part, not made)
        return made

    def _recut(self, ids: list[int], start: bool) -> list[int]:
        pieces, whole = self.kept[ids].tolist(), b"".join(map(self.new.bytes_of, ids))
        try:
            made = self.old.encode_plain(whole.decode("utf-8"), start)
        except UnicodeDecodeError:
            return pieces
        return made if b"".join(map(self.old.bytes_of, made)) == whole else pieces

    def meeting(self, ids: Sequence[int], restored: Sequence[int]) -> np.ndarray:
        """For each of the new ids the place of the old one that ends where it does, int32; -1: none does."""
        ends = {end: at for at, end in enumerate(_ends(self.old, restored))}
        return np.array([ends.get(end, -1) for end in _ends(self.new, ids)], np.int32)

    def spoken(self, logits: np.ndarray) -> np.ndarray:
        """The original's logits [N, V] as those of what stays, [N, kept]: sums over what begins alike."""
        most = logits.max(-1, keepdims=True)
        sums = np.add.reduceat(np.exp(logits - most)[:, self.order], self.starts, axis=-1)
        made = np.full((len(logits), len(self.kept)), NOTHING, np.float32)
        with np.errstate(divide="ignore"):
            made[:, self.said] = np.maximum(np.log(sums) + most, NOTHING)
        return made


def _ends(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    return np.cumsum([len(tokenizer.bytes_of(id)) for id in ids]).tolist()


@dataclass(frozen=True)
class Translator(Teacher):
    """The original as the teacher of a model that knows fewer tokens."""

    translation: Translation = field(kw_only=True)

    def read(self, batch: Batch) -> Taught:
        rows = [row[:length].tolist() for row, length in zip(batch.ids, batch.step.lengths, strict=True)]
        restored = [self.translation.restored(row) for row in rows]
        longest = max(map(len, restored))
        ids = np.zeros((len(rows), longest), np.int32)
        places = np.full(batch.ids.shape, -1, np.int32)
        for r, (row, old) in enumerate(zip(rows, restored, strict=True)):
            ids[r, : len(old)] = old
            met = self.translation.meeting(row, old)
            places[r, : len(row)] = np.where(met < 0, -1, r * longest + met)
        lengths = np.array([len(old) for old in restored], np.int32)
        hidden = self.decoder.hidden(self.decoder.ops.array(ids), _whole(lengths))
        flat = places.reshape(-1)
        hidden = hidden.reshape(-1, self.decoder.config.width)
        return Taught(self.decoder.ops.take(hidden, np.maximum(flat, 0)), flat >= 0)

    def logits(self, hidden: A) -> A:
        ops = self.decoder.ops
        return ops.array(self.translation.spoken(ops.numpy(super().logits(hidden))))


def _whole(lengths: np.ndarray) -> Step:
    rows = len(lengths)
    return Step(np.zeros(rows, np.int32), lengths, np.arange(rows, dtype=np.int32))
