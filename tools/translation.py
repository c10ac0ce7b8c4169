"""Between a vocabulary and the part of it that was kept: how the whole model teaches one that knows fewer tokens.

A token that went is now said piece by piece. Where the two ways of cutting a text meet, what follows is the same text:
there the first piece's probability is the sum over all tokens that would begin with it. Behind a first piece the whole
model has said already how likely which token was to be begun: from that follows how likely which piece is to come next,
and how likely it is that the word was meant to end there. So the product of the pieces' probabilities is the token's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from ..backends.base import A, Step
from ..runtime.tokenizer import Tokenizer
from ..train.batches import Batch
from ..train.learner import Taught, Teacher

NOTHING = np.float32(-1e4)  # the logit of what cannot be said
ROWS = 64  # predictions of the whole model that are held at once


class Translation:
    """old, new: tokenizers before and after; kept: the old id of each new one."""

    def __init__(self, old: Tokenizer, new: Tokenizer, kept: np.ndarray):
        self.old, self.new, self.kept = old, new, kept
        self.spelled = self._spelled()
        self.firsts = self._firsts()
        self.order = np.array([id for id in self.spelled if self.firsts[id] >= 0], np.int64)
        self.order = self.order[np.argsort(self.firsts[self.order], kind="stable")]
        self.said, self.starts = np.unique(self.firsts[self.order], return_index=True)
        self.longer = self._longer()

    def _spelled(self) -> dict[int, tuple[int, ...]]:
        """Old tokens that went -> the new ones that say the same; none for what is no text by itself."""
        found = {}
        for id in np.setdiff1d(np.arange(self.old.vocab_size), self.kept).tolist():
            text = self.old.bytes_of(id).decode("utf-8", "replace")
            if text and "\ufffd" not in text:
                found[id] = tuple(self.new.encode_plain(text, False))
        return found

    def _firsts(self) -> np.ndarray:
        """For each old token the new one that now begins it, int32 [V]; -1 for what is no text by itself."""
        firsts = np.full(self.old.vocab_size, -1, np.int32)
        for id, pieces in self.spelled.items():
            firsts[id] = next(iter(pieces), -1)
        stays = self.kept < len(firsts)
        firsts[self.kept[stays]] = np.flatnonzero(stays)
        return firsts

    def _longer(self) -> dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]]:
        """The beginning of some token that went, in new ones -> all that begin so, and how each goes on."""
        found: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        for id, pieces in self.spelled.items():
            for length in range(1, len(pieces)):
                found[pieces[:length]].append((id, pieces[length]))
        return {begun: tuple(np.array(pairs, np.int64).T) for begun, pairs in found.items()}

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

    def spoken(self, chances: np.ndarray) -> np.ndarray:
        """The original's probabilities [N, V] as those of what stays, [N, kept]: sums over what begins alike."""
        made = np.take(chances, self.kept, axis=-1)
        made[:, self.said] += np.add.reduceat(np.take(chances, self.order, axis=-1), self.starts, axis=-1)
        return made

    def going_on(self, chances: np.ndarray, begun: tuple[int, ...], ended: int | None) -> tuple[np.ndarray, float]:
        """What follows `begun`, given the original's probabilities [V] in front of it: those of the pieces that go on,
        [kept], and the one that the token was `ended`, the old one that `begun` says as it stands. Both 0: unknown."""
        goes = np.zeros(len(self.kept), np.float32)
        if begun in self.longer:
            ids, following = self.longer[begun]
            np.add.at(goes, following, chances[ids])
        ends = 0.0 if ended is None else float(chances[ended])
        total = float(goes.sum()) + ends
        return (goes / total, ends / total) if total > 0 else (goes, 0.0)


def _ends(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    return np.cumsum([len(tokenizer.bytes_of(id)) for id in ids]).tolist()


@dataclass(frozen=True)
class Translator(Teacher):
    """The original as the teacher of a model that knows fewer tokens. What it hands on is logits, not hidden rows."""

    translation: Translation = field(kw_only=True)

    def read(self, batch: Batch) -> Taught:
        rows = [row[:length].tolist() for row, length in zip(batch.ids, batch.step.lengths, strict=True)]
        restored = [self.translation.restored(row) for row in rows]
        whole = self._hidden(restored)
        pieces = self._hidden([self.translation.kept[row].tolist() for row in rows])
        wanted = np.zeros((*batch.ids.shape, len(self.translation.kept)), np.float32)
        for r, (row, old) in enumerate(zip(rows, restored, strict=True)):
            self._teach(wanted[r], row, old, (whole, r * max(map(len, restored))), (pieces, r * max(map(len, rows))))
        wanted = wanted.reshape(-1, wanted.shape[-1])
        known = wanted.sum(-1) > 0
        with np.errstate(divide="ignore"):
            return Taught(self.decoder.ops.array(np.maximum(np.log(wanted), NOTHING)), known)

    def _hidden(self, rows: Sequence[Sequence[int]]) -> A:
        ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = row
        lengths = np.array([len(row) for row in rows], np.int32)
        hidden = self.decoder.hidden(self.decoder.ops.array(ids), _whole(lengths))
        return hidden.reshape(-1, self.decoder.config.width)

    def _teach(
        self, wanted: np.ndarray, row: list[int], old: list[int], whole: tuple[A, int], pieces: tuple[A, int]
    ) -> None:
        """Fills in wanted [T, kept], a row's probabilities; what stays zero is not known. whole, pieces: hidden rows of
        the original that reads its own tokens, or the new ones, and where this row's begin."""
        t, met = self.translation, self.translation.meeting(row, old)
        meets = np.flatnonzero(met >= 0)
        alone = [at + 1 for at in meets.tolist() if at + 1 < len(row) and met[at + 1] < 0]
        for places, chances in self._chances(pieces, alone, alone):
            wanted[places] = t.spoken(chances)
        begun = []
        for places, chances in self._chances(whole, meets, met[meets]):
            wanted[places] = t.spoken(chances)
            for place, front in zip(places.tolist(), chances, strict=True):
                begun += self._begun(row, old, met, place, front)
        for place, goes, ends in begun:
            wanted[place] = wanted[place] * ends + goes

    def _begun(
        self, row: list[int], old: list[int], met: np.ndarray, place: int, chances: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray, float]]:
        """The places behind `place`, up to the next at which both ways of cutting meet, and what `going_on` says there.
        chances [V]: what the original expects behind `place`."""
        t = self.translation
        for at in range(place + 1, len(row)):
            said, ended = tuple(row[place + 1 : at + 1]), None
            if met[at] < 0:
                ended = int(t.kept[row[at]]) if len(said) == 1 else None
            elif met[at] == met[place] + 1:
                ended = old[met[at]]
            else:
                return
            goes, ends = t.going_on(chances, said, ended)
            if met[at] < 0 or goes.any():
                yield at, goes, ends
            if met[at] >= 0:
                return

    def _chances(
        self, hidden: tuple[A, int], places: Sequence[int], rows: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Some places, and what the original expects behind each, [n, V]. rows: theirs among the hidden ones."""
        ops, (states, first) = self.decoder.ops, hidden
        for at in range(0, len(places), ROWS):
            taken = ops.take(states, first + np.asarray(rows[at : at + ROWS], np.int32))
            logits = ops.numpy(super().logits(taken))
            chances = np.exp(logits - logits.max(-1, keepdims=True))
            yield np.asarray(places[at : at + ROWS]), chances / chances.sum(-1, keepdims=True)

    def logits(self, hidden: A) -> A:
        return hidden


def _whole(lengths: np.ndarray) -> Step:
    rows = len(lengths)
    return Step(np.zeros(rows, np.int32), lengths, np.arange(rows, dtype=np.int32))
