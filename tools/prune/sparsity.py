"""Single weights made zero: a share of each matrix, or n of every m neighbours in a row.

magnitude: the smallest. wanda (Sun et al. 2023): the smallest |w| times the norm of what it meets, row by row.
sparsegpt (Frantar & Alistarh 2023): column by column, what costs least once the columns to come have made up for it;
and they do. The embedding and the head stay whole, as do routers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace

import numpy as np

from ..calibration import stream
from ..progress import Progress
from ..quantize.gptq import DAMPING, inverse_factor
from ..quantize.matrices import matrices
from ..quantize.statistics import Inputs
from .cutting import Cut, rounded
from .events import Score, Scores
from .options import Sparsity
from .subject import Subject

BLOCK = 128  # columns among which SparseGPT chooses at once

Choice = Generator[Progress, None, tuple[Cut, Scores]]


def choose(subject: Subject, cut: Cut) -> Choice:
    names = [name for name in matrices(subject.parameters) if name.startswith("layers.")]
    work = _unseen(subject, names) if subject.options.method == "magnitude" else _seen(subject, set(names))
    tensors, rows = {}, []
    while True:
        try:
            event = next(work)
        except StopIteration:
            break
        if isinstance(event, Progress):
            yield event
            continue
        name, values, made = event
        tensors[name] = rounded(made, subject.parameters[name])
        lost = float(np.square(values - made).sum() / max(float(np.square(values).sum()), 1e-30))
        rows.append(Score(name, lost, int(np.count_nonzero(made)), made.size))
    return replace(cut, tensors=tensors), Scores("matrices", "relative change", tuple(rows))


Made = tuple[str, np.ndarray, np.ndarray]  # our name, before, after


def _unseen(subject: Subject, names: list[str]) -> Iterator[Progress | Made]:
    for done, name in enumerate(names):
        yield Progress("Choosing weights", done, len(names), "matrices")
        values = subject.numbers(name)
        yield name, values, _zeroed(values, np.abs(values), subject.options.sparsity, whole=True)


def _seen(subject: Subject, names: set[str]) -> Iterator[Progress | Made]:
    windows = yield from subject.windows()
    layers = len(subject.config.layers)
    for stage in stream(subject.config, subject.parameters, subject.ops, windows):
        wanted = [name for name in stage.names if name in names]
        if not wanted:
            continue
        yield Progress("Choosing weights", int(stage.prefix.rpartition(".")[2]), layers, "layers")
        inputs = Inputs()
        stage.observe(inputs)
        for name in wanted:
            values = subject.numbers(name)
            made = _pruned(subject, inputs, name, values)
            stage.replace(name, rounded(made, subject.parameters[name]))
            yield name, values, made


def _pruned(subject: Subject, inputs: Inputs, name: str, values: np.ndarray) -> np.ndarray:
    """A matrix [O, I], or a stack [E, O, I] each of whose experts is judged by the tokens that it was sent."""
    o = subject.options
    if values.ndim == 2:
        return _by_inputs(values, inputs.gram(name), o.sparsity, o.method)
    made = np.empty_like(values)
    for e, (count, gram) in enumerate(inputs.expert_grams(name, len(values))):
        seen = gram if count else np.eye(values.shape[-1])  # no token came: by magnitude
        made[e] = _by_inputs(values[e], seen, o.sparsity, o.method if count else "wanda")
    return made


def _by_inputs(values: np.ndarray, gram: np.ndarray, sparsity: Sparsity, method: str) -> np.ndarray:
    if method == "sparsegpt":
        return sparsegpt(values, gram, sparsity)
    return _zeroed(values, np.abs(values) * np.sqrt(np.diag(gram)).astype(np.float32), sparsity)


def _zeroed(values: np.ndarray, scores: np.ndarray, sparsity: Sparsity, whole: bool = False) -> np.ndarray:
    """The least by score become zero: of each row, or (whole) of the tensor; n:m of each m neighbours."""
    made = values.copy()
    made[_least(scores, sparsity, whole)] = 0
    return made


def _least(scores: np.ndarray, sparsity: Sparsity, whole: bool = False) -> np.ndarray:
    """Which are to be zero, bool of the scores' shape. A rest of columns that fills no m is left alone."""
    if sparsity.m:
        columns = scores.shape[-1] // sparsity.m * sparsity.m
        grouped = scores[..., :columns].reshape(*scores.shape[:-1], -1, sparsity.m)
        chosen = np.zeros(scores.shape, bool)
        chosen[..., :columns] = _lowest(grouped, sparsity.m - sparsity.n).reshape(*scores.shape[:-1], columns)
        return chosen
    rows = scores.reshape(1, -1) if whole else scores
    return _lowest(rows, round(sparsity.share * rows.shape[-1])).reshape(scores.shape)


def _lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` lowest along the last axis."""
    chosen = np.zeros(scores.shape, bool)
    if count:
        np.put_along_axis(chosen, np.argpartition(scores, count - 1, axis=-1)[..., :count], True, axis=-1)
    return chosen


def sparsegpt(values: np.ndarray, gram: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """values [O, I] float32, gram [I, I] = E[x x^T] -> float32 [O, I]"""
    upper = inverse_factor(gram, DAMPING).astype(np.float32)
    left = np.ascontiguousarray(values.T)  # [I, O]: a column of the matrix is a row here
    block = -(-BLOCK // sparsity.m) * sparsity.m if sparsity.m else BLOCK
    for at in range(0, len(left), block):
        end = min(at + block, len(left))
        errors = _eliminate(left[at:end], upper[at:end, at:end], sparsity)
        left[end:] -= upper[at:end, end:].T @ errors
    return np.ascontiguousarray(left.T)


def _eliminate(left: np.ndarray, upper: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """Columns [n, O] in turn, in place -> what each leaves to those to come, scaled."""
    errors = np.zeros_like(left)
    diagonal = np.diag(upper)
    step = sparsity.m or len(left)
    for at in range(0, len(left), step):
        end = min(at + step, len(left))
        scores = np.square(left[at:end] / diagonal[at:end, None])
        gone = _least(scores.T, sparsity).T if sparsity.m else _least(scores, sparsity, whole=True)
        for j in range(at, end):
            errors[j] = np.where(gone[j - at], left[j] / diagonal[j], 0)
            left[j][gone[j - at]] = 0
            left[j + 1 :] -= upper[j, j + 1 :, None] * errors[j]
    return errors
