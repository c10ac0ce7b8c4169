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

LOGITS_BYTES = 96 << 20  # of the logits held at once, so that the head is unpacked for many; their gradient is as large
LEAN_LOGITS_BYTES = 32 << 20  # with rematerialisation


@dataclass(frozen=True)
class Taught:
    """What a teacher makes of a batch: hidden [B * T, D of the teacher]; known [B * T], where it has something to say
    (None: everywhere). Elsewhere the data's own tokens are learnt."""

    hidden: A
    known: np.ndarray | None = None


@dataclass(frozen=True)
class Teacher:
    """What is imitated when distilling: a decoder, how much its logits are softened, and the share of the loss that
    stays with the data's own tokens. A subclass may read and speak in other tokens than the model that learns."""

    decoder: Decoder
    temperature: float = 1.0
    hard: float = 0.0

    def read(self, batch: Batch) -> Taught:
        decoder = self.decoder
        hidden = decoder.hidden(decoder.ops.array(batch.ids), batch.step)
        return Taught(hidden.reshape(-1, decoder.config.width))

    def logits(self, hidden: A) -> A:
        """hidden [N, D] -> [N, V], V being the learning model's."""
        return self.decoder.head(self.decoder.scope(), hidden)


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
        return max(16, logits_bytes(self.remat) // (4 * self.decoder.config.vocab) // 16 * 16)

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
        hidden, taught = self.hidden(params, batch, moment), self.teacher and self.teacher.read(batch)
        targets, head = batch.targets.reshape(-1)[places], _of_head(params)
        total = None
        for at, end in self._chunks(len(places)):
            known = (
                ops.array(targets[at:end]),
                self._told(taught, places[at:end]),
                ops.array(weights[at:end].astype(np.float32), "float32"),
            )
            share = ops.remat(partial(self._share, moment, known))(head, ops.take(hidden, places[at:end]))
            total = share if total is None else total + share
        return total

    def _share(self, moment: int | None, known: tuple[A, tuple | None, A], params: Params, x: A) -> A:
        """known: targets, teacher's hidden rows and weights: constants, which must not be arguments (MLX)."""
        targets, taught, weights = known
        logits = self.decoder.head(self.method.scope(params, moment), x)
        return self.decoder.ops.sum(self._losses(logits, targets, taught) * weights)

    def _told(self, taught: Taught | None, places: np.ndarray) -> tuple[A, A | None] | None:
        """Of some places: the teacher's hidden rows, and 1 where it has something to say."""
        if taught is None:
            return None
        ops = self.decoder.ops
        known = None if taught.known is None else ops.array(taught.known[places].astype(np.float32), "float32")
        return ops.take(taught.hidden, places), known

    def _losses(self, logits: A, targets: A, told: tuple[A, A | None] | None) -> A:
        """Each row's loss: of its target, or from a teacher (Hinton et al. 2015: with the gradient's size restored)."""
        ops, teacher = self.decoder.ops, self.teacher
        if told is None:
            return ops.token_loss(logits, targets)
        (hidden, known), soft = told, 1 / teacher.temperature
        wanted = teacher.logits(hidden) * soft
        divergence = ops.token_loss(logits * soft, wanted) + ops.token_loss(wanted, wanted) * -1.0
        losses = divergence * ((1 - teacher.hard) * teacher.temperature**2)
        if known is None:
            return losses + ops.token_loss(logits, targets) * teacher.hard if teacher.hard else losses
        plain = ops.token_loss(logits, targets)
        return losses * known + plain * (known * (teacher.hard - 1.0) + 1.0)

    def losses(self, params: Params, batch: Batch, moment: int | None = None) -> np.ndarray:
        """Each target's loss, [M] float32, without gradients."""
        ops, places = self.decoder.ops, batch.places
        hidden, taught = self.hidden(params, batch, moment), self.teacher and self.teacher.read(batch)
        targets, scope = batch.targets.reshape(-1)[places], self.method.scope(_of_head(params), moment)
        found = []
        for at, end in self._chunks(len(places)):
            logits = self.decoder.head(scope, ops.take(hidden, places[at:end]))
            told = self._told(taught, places[at:end])
            found.append(ops.numpy(self._losses(logits, ops.array(targets[at:end]), told)))
        return np.concatenate(found)

    def _chunks(self, count: int) -> Iterator[tuple[int, int]]:
        """Of like size, so that one's memory is the next one's."""
        parts = max(1, -(-count // self.chunk))
        step = -(-count // parts)
        for at in range(0, count, step or 1):
            yield at, min(at + step, count)


def logits_bytes(remat: bool) -> int:
    """Of the logits held at once, at most."""
    return LEAN_LOGITS_BYTES if remat else LOGITS_BYTES


def _of_layer(params: Params, i: int) -> dict[str, A]:
    return {name: a for name, a in params.items() if name.startswith(f"layers.{i}.")}


def _of_head(params: Params) -> dict[str, A]:
    """What stands behind the last layer; the embedding may be the head."""
    return {name: a for name, a in params.items() if name.split(".")[0] in ("head", "norm", "embed")}
