"""The forward pass of training: losses of the places that have a target, and nothing more.

The head runs on those places alone, a few rows at a time, so that logits are never whole; with rematerialisation each
layer keeps nothing but its input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..backends.base import A
from ..models.decoder import Decoder
from .batches import Batch
from .methods import Method, Params

LOGITS_BYTES = 32 << 20  # of the logits held at once; their gradient and the softmax are as large again


@dataclass(frozen=True)
class Teacher:
    """What is imitated when distilling: a decoder, how much its logits are softened, and the share of the loss that
    stays with the data's own tokens."""

    decoder: Decoder
    temperature: float
    hard: float


@dataclass(frozen=True)
class Learner:
    """A method's view of a model, as losses."""

    method: Method
    remat: bool = False
    teacher: Teacher | None = None

    @property
    def decoder(self) -> Decoder:
        return self.method.decoder

    @property
    def chunk(self) -> int:
        """Rows of logits held at once."""
        return max(16, LOGITS_BYTES // (4 * self.decoder.config.vocab) // 16 * 16)

    def hidden(self, params: Params, batch: Batch, moment: int | None) -> A:
        """What the last layer says, [B * T, D]."""
        x = self.method.embed(params, batch, moment)
        for i in range(len(self.decoder.config.layers)):
            run = partial(self._block, i, batch, moment)
            x = (self.decoder.ops.remat(run) if self.remat else run)(_of_layer(params, i), x)
        return x.reshape(-1, self.decoder.config.width)

    def _block(self, i: int, batch: Batch, moment: int | None, params: Params, x: A) -> A:
        return self.decoder.block(self.method.scope(params, moment), i, x, batch.step)

    def loss(self, params: Params, batch: Batch, weights: np.ndarray, moment: int | None) -> A:
        """The sum of each target's loss times its weight [M]: a scalar to differentiate."""
        ops, places = self.decoder.ops, batch.places
        hidden, taught = self.hidden(params, batch, moment), self._taught(batch)
        targets, head = batch.targets.reshape(-1)[places], _of_head(params)
        total = None
        for at, end in self._chunks(len(places)):
            known = (
                ops.array(targets[at:end]),
                None if taught is None else ops.take(taught, places[at:end]),
                ops.array(weights[at:end].astype(np.float32), "float32"),
            )
            share = ops.remat(partial(self._share, moment, known))(head, ops.take(hidden, places[at:end]))
            total = share if total is None else total + share
        return total

    def _share(self, moment: int | None, known: tuple[A, A | None, A], params: Params, x: A) -> A:
        """known: targets, teacher's hidden rows and weights: constants, which must not be arguments (MLX)."""
        targets, taught, weights = known
        logits = self.decoder.head(self.method.scope(params, moment), x)
        return self.decoder.ops.sum(self._losses(logits, targets, taught) * weights)

    def _losses(self, logits: A, targets: A, taught: A | None) -> A:
        """Each row's loss: of its target, or from a teacher (Hinton et al. 2015: with the gradient's size restored)."""
        ops, teacher = self.decoder.ops, self.teacher
        if teacher is None:
            return ops.token_loss(logits, targets)
        soft = 1 / teacher.temperature
        wanted = teacher.decoder.head(teacher.decoder.scope(), taught) * soft
        divergence = ops.token_loss(logits * soft, wanted) + ops.token_loss(wanted, wanted) * -1.0
        losses = divergence * ((1 - teacher.hard) * teacher.temperature**2)
        return losses + ops.token_loss(logits, targets) * teacher.hard if teacher.hard else losses

    def losses(self, params: Params, batch: Batch, moment: int | None = None) -> np.ndarray:
        """Each target's loss, [M] float32, without gradients."""
        ops, places = self.decoder.ops, batch.places
        hidden, taught = self.hidden(params, batch, moment), self._taught(batch)
        targets, scope = batch.targets.reshape(-1)[places], self.method.scope(_of_head(params), moment)
        found = []
        for at, end in self._chunks(len(places)):
            logits = self.decoder.head(scope, ops.take(hidden, places[at:end]))
            known = None if taught is None else ops.take(taught, places[at:end])
            found.append(ops.numpy(self._losses(logits, ops.array(targets[at:end]), known)))
        return np.concatenate(found)

    def _taught(self, batch: Batch) -> A | None:
        """The teacher's last layer, [B * T, D of the teacher]."""
        if self.teacher is None:
            return None
        decoder = self.teacher.decoder
        return decoder.hidden(decoder.ops.array(batch.ids), batch.step).reshape(-1, decoder.config.width)

    def _chunks(self, count: int) -> Iterator[tuple[int, int]]:
        for at in range(0, count, self.chunk):
            yield at, min(at + self.chunk, count)


def _of_layer(params: Params, i: int) -> dict[str, A]:
    return {name: a for name, a in params.items() if name.startswith(f"layers.{i}.")}


def _of_head(params: Params) -> dict[str, A]:
    """What stands behind the last layer; the embedding may be the head."""
    return {name: a for name, a in params.items() if name.split(".")[0] in ("head", "norm", "embed")}
