"""Examples -> batches: an endless order that is a pure function of the seed, so that a step's number is all that a
resumed run needs to know of where it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .. import noise
from ..backends.base import Step
from .data import Example
from .settings import Settings

GROUP = 32  # batches among which examples of like length are brought together

Row = list[int]  # numbers of the examples in one row: one, or several when packing


@dataclass(frozen=True)
class Batch:
    """What goes through the model at once: ids int32 [B, T] (negative: virtual tokens), targets int32 [B, T] (-1:
    nothing to learn), where the tokens are, and of which sequence (`owner` [B, T], -1: none) each is. A preference's
    chosen sequences come first, the rejected ones behind them in the same order. sources: where the examples come
    from."""

    ids: np.ndarray
    targets: np.ndarray
    owner: np.ndarray
    step: Step
    sources: tuple[str, ...]

    @property
    def places(self) -> np.ndarray:
        """Of the B * T places, those with a target."""
        return np.flatnonzero(self.targets.reshape(-1) >= 0).astype(np.int32)

    @property
    def learnt(self) -> int:
        return int((self.targets >= 0).sum())

    @property
    def tokens(self) -> int:
        return int(self.step.lengths.sum())


def rows_of(examples: Sequence[Example], settings: Settings, epoch: int) -> list[Row]:
    """One epoch's rows, in the order of their use; examples of like length stand together."""
    order = list(range(len(examples)))
    if settings.shuffle:
        order = noise.generator(settings.seed, "order", epoch).permutation(len(examples)).tolist()
    if settings.pack:
        return _packed(order, examples, settings.max_length)
    if not settings.shuffle:
        return [[i] for i in order]
    per_step = settings.batch_size * settings.accumulate
    groups = [order[at : at + GROUP * per_step] for at in range(0, len(order), GROUP * per_step)]
    alike = [sorted(group, key=lambda i: -examples[i].length) for group in groups]
    batches = [group[at : at + per_step] for group in alike for at in range(0, len(group), per_step)]
    shuffled = noise.generator(settings.seed, "batches", epoch).permutation(len(batches)).tolist()
    return [[i] for b in shuffled for i in batches[b]]


def _packed(order: Sequence[int], examples: Sequence[Example], room: int) -> list[Row]:
    """First fit, in the order given; only the rows opened last are looked through, which keeps it quick."""
    rows: list[Row] = []
    free: list[int] = []
    for i in order:
        need = examples[i].length - 1  # the last id is only a target
        fits = (r for r in range(max(0, len(rows) - 64), len(rows)) if free[r] >= need)
        row = next(fits, None)
        if row is None:
            rows.append([])
            free.append(room)
            row = len(rows) - 1
        rows[row].append(i)
        free[row] -= need
    return rows


def steps_an_epoch(examples: Sequence[Example], settings: Settings) -> int:
    per_step = settings.batch_size * settings.accumulate
    return -(-len(rows_of(examples, settings, 0)) // per_step)


def steps_of_rows(examples: Sequence[Example], settings: Settings, done: int = 0) -> Iterator[list[Row]]:
    """The rows of each optimizer step, without end, from step `done` on."""
    per_step = settings.batch_size * settings.accumulate
    epoch = 0
    while True:
        rows = rows_of(examples, settings, epoch)
        steps = [rows[at : at + per_step] for at in range(0, len(rows), per_step)]
        yield from steps[done:]
        done = max(0, done - len(steps))
        epoch += 1


def batches_of(examples: Sequence[Example], rows: Sequence[Row], most: int, virtual: int = 0) -> list[Batch]:
    """Rows as batches of at most `most`."""
    return [make_batch(examples, rows[at : at + most], virtual) for at in range(0, len(rows), most)]


def make_batch(examples: Sequence[Example], rows: Sequence[Row], virtual: int = 0) -> Batch:
    """Every row padded on the right to the longest. Several sequences in a row are kept apart by segments. virtual:
    tokens of prompt tuning in front of each sequence, with the ids -1, -2, …"""
    kinds = len(examples[rows[0][0]].sequences)
    lines = [[examples[i].sequences[kind] for i in row] for kind in range(kinds) for row in rows]
    lengths = np.array([sum(virtual + s.length - 1 for s in line) for line in lines], np.int32)
    shape = (len(lines), int(lengths.max()))
    ids, targets, owner, segments = np.zeros(shape, np.int32), *(np.full(shape, -1, np.int32) for _ in range(3))
    number = 0
    for r, line in enumerate(lines):
        at = 0
        for segment, s in enumerate(line):
            start, end = at + virtual, at + virtual + s.length - 1
            ids[r, at:start] = -1 - np.arange(virtual)
            ids[r, start:end] = s.ids[:-1]
            targets[r, start:end] = np.where(s.learnt[1:], s.ids[1:], -1)
            owner[r, at:end], segments[r, at:end] = number, segment
            at, number = end, number + 1
    packed = max(map(len, lines)) > 1
    starts, slots = np.zeros(len(lines), np.int32), np.arange(len(lines), dtype=np.int32)
    step = Step(starts, lengths, slots, segments if packed else None)
    return Batch(ids, targets, owner, step, tuple(examples[i].source for row in rows for i in row))
