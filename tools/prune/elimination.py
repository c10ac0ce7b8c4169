"""Columns of a matrix taken away in groups, the rest changed to make up for them (ZipLM, Kurtic et al. 2023).

With y = W x and C = E[x x^T], what a group S costs once the others have done what they can is
tr(W_S (C^-1_SS)^-1 W_S^T); taking it away moves the others by -W_S (C^-1_SS)^-1 C^-1_S:.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DAMPING = 0.01  # of the mean of C's diagonal, added to it: what was not seen may still come
ROUNDS = 24  # of elimination: costs are looked at afresh in each


@dataclass(frozen=True)
class Eliminated:
    """kept: groups, ascending. weight: float32 [O, I], zero where columns are gone. loss: of the output's energy, the
    share that is lost on the calibration set."""

    kept: np.ndarray
    weight: np.ndarray
    loss: float


def eliminate(weight: np.ndarray, gram: np.ndarray, size: int, count: int, repair: bool = True) -> Eliminated:
    """weight float32 [O, I], gram [I, I] = E[x x^T]; `count` of the I / size groups go.

    repair=False: the rest stays as it is, and groups go by the norms of their columns times those of what they meet.
    """
    groups = weight.shape[1] // size
    if repair:
        kept, made = _with_repair(weight.astype(np.float64), gram, size, count)
    else:
        energy = (np.square(weight, dtype=np.float64).sum(0) * np.diag(gram)).reshape(groups, size).sum(-1)
        kept = np.sort(np.argsort(energy, kind="stable")[count:])
        made = np.zeros(weight.shape)
        columns = _columns(kept, size)
        made[:, columns] = weight[:, columns]
    change = made - weight
    total = max(float(np.einsum("oi,ij,oj->", weight, gram, weight, optimize=True)), 1e-30)
    lost = float(np.einsum("oi,ij,oj->", change, gram, change, optimize=True))
    return Eliminated(kept, made.astype(np.float32), lost / total)


def _columns(groups: np.ndarray, size: int) -> np.ndarray:
    return (np.asarray(groups)[:, None] * size + np.arange(size)).reshape(-1)


def _with_repair(made: np.ndarray, gram: np.ndarray, size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    groups = made.shape[1] // size
    damped = gram + np.eye(len(gram)) * max(DAMPING * float(np.diag(gram).mean()), 1e-12)
    inverse = np.linalg.inv(damped)
    alive = np.arange(groups)
    step = max(1, -(-count // ROUNDS))
    while count:
        costs = _costs(made, inverse, alive, size)
        gone = alive[np.argsort(costs, kind="stable")[: min(step, count)]]
        count -= len(gone)
        columns = _columns(gone, size)
        factor = np.linalg.solve(inverse[np.ix_(columns, columns)], inverse[columns])
        made -= made[:, columns] @ factor
        inverse -= inverse[:, columns] @ factor
        alive = np.setdiff1d(alive, gone)
        dead = np.setdiff1d(np.arange(len(inverse)), _columns(alive, size))
        made[:, dead], inverse[dead], inverse[:, dead] = 0, 0, 0
    return alive, made


def _costs(made: np.ndarray, inverse: np.ndarray, alive: np.ndarray, size: int) -> np.ndarray:
    if size == 1:
        return np.square(made[:, alive]).sum(0) / np.diag(inverse)[alive]
    costs = []
    for group in alive:
        columns = _columns([group], size)
        block = made[:, columns]
        costs.append(float((block.T * np.linalg.solve(inverse[np.ix_(columns, columns)], block.T)).sum()))
    return np.array(costs)
