"""The run: a generator of events, from the first step to the adapter that is kept.

Each step is a pure function of the state behind the step before and of its own number: what is drawn (order, dropout)
comes from the seed and that number. A run that is stopped anywhere and goes on from its last checkpoint therefore
ends in the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.base import A
from ..errors import BadOption, OnDeviceError, Unsupported
from ..machine import peak_memory_bytes
from ..runtime.session import Session
from . import folder as place
from . import state as states
from .artifacts import write_artifact
from .batches import Batch, batches_of, rows_of, steps_an_epoch, steps_of_rows
from .data import Data, Example
from .events import Event, Finished, Saved, Started, StepDone, Validating
from .learner import Learner, Teacher
from .methods import Method, Prompt, make_method
from .objectives import make_objective
from .planning import Plan, plan
from .schedule import rate_at
from .settings import Settings
from .state import State

MOMENTS = 1 << 20  # batches a step may have: numbers dropout's patterns
RECENT = 5  # steps that must all be worse than the first before a run counts as diverging
WORSE = 2.0  # by so much: nats


@dataclass(frozen=True)
class Saving:
    """When checkpoints are made, beside those at the end of a run that is interrupted."""

    steps: int | None = None
    minutes: float = 5.0

    def __post_init__(self):
        if not self.minutes >= 0:
            raise BadOption(f"--save-minutes {self.minutes:g} makes no sense.", "Give 0 or more.")


def train(
    session: Session, data: Data, settings: Settings, dest: str | Path | None = None, *, resume: bool = False,
    saving: Saving | None = None, teacher: Session | Teacher | None = None,
    initial: Mapping[str, np.ndarray] | None = None,
    memory: int | None = None,
) -> Iterator[Event]:  # fmt: skip
    """Train, and end with Finished, which holds what was learnt.

    dest: the folder of the adapter (full: of the model), of metrics and checkpoints; None: nothing is written. resume:
    go on with the run in dest, if there is one. teacher: imitated by the objective `distill`, as the settings say, or
    as a Teacher says for itself. initial: where the
    parameters begin, by name, instead of the method's own choice. memory: bytes to plan for. Raises OnDeviceError's
    children; Ctrl-C leaves a checkpoint behind.
    """
    with ExitStack() as stack:
        if dest is not None:
            stack.enter_context(place.locked(Path(dest)))
        run = _Run(session, data, settings, None if dest is None else Path(dest), resume, teacher, initial, memory)
        yield from run.events(saving or Saving())


class _Run:
    """What does not change from step to step."""

    def __init__(
        self, session: Session, data: Data, settings: Settings, dest: Path | None, resume: bool,
        teacher: Session | Teacher | None, initial: Mapping[str, np.ndarray] | None, memory: int | None,
    ):  # fmt: skip
        _check(session, settings, teacher)
        _check_lengths(session, data, settings.virtual_tokens if settings.method == "prompt" else 0)
        self.session, self.data, self.settings, self.dest = session, data, settings, dest
        self.ops = session.backend
        then = place.admit(dest, resume) if dest else None
        self.method = make_method(session, settings)
        self.steps = settings.steps
        if self.steps is None:
            self.steps = math.ceil(settings.epochs * steps_an_epoch(data.train, settings))
        begin = self.method.initial() if initial is None else _fitting(initial, self.method)
        self.parameters = sum(values.size for values in begin.values())
        self.identity = self._identity(initial)
        if then:
            place.check_unchanged(dest, then, {"identity": self.identity})
            self.plan = Plan(**then["plan"])
        else:
            self.plan = plan(session, data, settings, self.parameters, memory)
        self.state = (states.load(dest, self.ops) if then else None) or self._fresh(begin)
        self.whole = self.state  # behind the last step that is told and validated: what a checkpoint holds
        self.ended = (then or {}).get("ended")
        if isinstance(teacher, Session):
            teacher = Teacher(teacher.decoder, settings.temperature, settings.hard)
        self.learner = Learner(self.method, self.plan.remat, teacher)
        self.objective = make_objective(settings, self.learner)
        self.virtual = settings.virtual_tokens if isinstance(self.method, Prompt) else 0
        self.every = settings.validate_every or max(1, -(-self.steps // 10))
        self.losses: list[float] = []
        if dest and not self.ended:
            self._record()
            self.metrics = place.Metrics(dest, self.state.step)
            self.losses = [m["loss"] for m in self.metrics.kept]
        self.saved_at = time.monotonic()

    def _fresh(self, begin: Mapping[str, np.ndarray]) -> State:
        return State({name: self.ops.array(values, "float32") for name, values in begin.items()})

    def _identity(self, initial: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
        """All that the resulting bits depend on."""
        info = self.ops.info()
        return {
            "base": place.digest_of(self.session.checkpoint),
            "data": self.data.digest,
            "initial": place.digest_of_arrays(initial) if initial else None,
            "backend": {"name": info.name, "device": info.device, "exact": info.exact},
            "settings": self.settings.as_dict(),
        }

    def _record(self, **more: Any) -> None:
        record = {"base": str(self.session.path), "identity": self.identity, "plan": self.plan.as_dict(), **more}
        place.write_record(self.dest, record)

    # ---- the run

    def events(self, saving: Saving) -> Iterator[Event]:
        yield Started(
            self.steps, self.ended["step"] if self.ended else self.state.step, self.parameters,
            self.plan.micro_batch, self.plan.remat, self.plan.memory,
        )  # fmt: skip
        if self.ended:
            place.clear(self.dest)  # it may have been killed when only this was left to do
            yield Finished(**self.ended)
            return
        early = False
        try:
            for step, rows in zip(
                range(self.state.step + 1, self.steps + 1),
                steps_of_rows(self.data.train, self.settings, self.state.step),
                strict=False,
            ):
                if early := self._stale():
                    break
                done = self._learn(step, rows)
                if self.data.valid and (step % self.every == 0 or step == self.steps):
                    done = replace(done, validation_loss=(yield from self._validate()))
                if self.dest:
                    self.metrics.add(done)
                self.whole = self.state
                yield done
                if self._due(saving, step):
                    yield self._save()
        except (KeyboardInterrupt, GeneratorExit, _Stopped):
            if self.dest and self.whole.step:
                self._save()
            raise
        yield self._end(early or self._stale())

    def _stale(self) -> bool:
        return self.settings.patience is not None and self.state.stale >= self.settings.patience

    def _end(self, early: bool) -> Finished:
        state = self.state
        best = state.best is not None and self.settings.keep_best
        kept = {name: self.ops.numpy(a) for name, a in (state.best if best else state.params).items()}
        loss = self.losses[-1] if self.losses else None
        finished = Finished(state.step, state.best_step if best else state.step, loss, state.best_loss, early, kept)
        if self.dest:
            try:
                write_artifact(self.dest, self.session, self.method, kept, self.settings)
            except OnDeviceError as error:
                self._save()
                hint = "All steps are kept: free some space and end the run with --resume."
                raise OnDeviceError(error.message, hint) from None
            self._record(ended=finished.as_dict())
            place.clear(self.dest)
        return finished

    # ---- one step

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")  # what is no number is found below, and told
    def _learn(self, step: int, rows: Sequence[list[int]]) -> StepDone:
        started = time.perf_counter()
        batches = batches_of(self.data.train, rows, self.plan.micro_batch, self.virtual)
        loss, grads = self._gradients(step, batches)
        norm = self._norm(grads)
        self._check_step(step, batches, loss, norm)
        rate = rate_at(self.settings, step, self.steps)
        if self.settings.clip and norm > self.settings.clip:
            grads = {name: g * (self.settings.clip / (norm + 1e-6)) for name, g in grads.items()}
        state = self.state
        params, moments = self.ops.adamw(
            state.params, grads, state.moments, step, rate, decay=self.settings.weight_decay,
            bits=self.settings.moment_bits,
        )  # fmt: skip
        if not math.isfinite(self._norm(params)):
            raise _Stopped(
                f"Step {step} stopped: its update leaves numbers that are none.",
                f"Give a lower --learning-rate: it was {rate:.2g}." + self._kept(step),
            )
        self.state = replace(state, params=params, moments=moments, step=step)
        seconds = time.perf_counter() - started
        tokens = sum(batch.tokens for batch in batches) / seconds
        return StepDone(step, loss, round(tokens, 1), peak_memory_bytes(), rate, norm)

    def _gradients(self, step: int, batches: Sequence[Batch]) -> tuple[float, dict[str, A]]:
        """The step's loss, and its gradient: each target counts the same, in whichever batch it stands."""
        total = sum(map(self.objective.share, batches))
        loss, grads = 0.0, {}
        for number, batch in enumerate(batches):
            moment = step * MOMENTS + number
            weights, known = self.objective.weigh(
                batch, lambda b=batch, m=moment: self.learner.losses(self.state.params, b, m), total
            )
            run = self.ops.value_and_grad(lambda params, b=batch, w=weights, m=moment: self._loss(params, b, w, m))
            (value, _), more = run(self.state.params)
            loss += float(self.ops.numpy(value)) if known is None else known
            grads = {name: grads[name] + g for name, g in more.items()} if grads else more
            if len(batches) > 1:
                self._norm(grads)  # asks for the sums now: backends that wait would keep every batch alive
        return loss, grads

    def _loss(self, params: Mapping[str, A], batch: Batch, weights: np.ndarray, moment: int) -> tuple[A, tuple]:
        return self.learner.loss(params, batch, weights, moment), ()

    def _norm(self, grads: Mapping[str, A]) -> float:
        total = None
        for name in sorted(grads):  # always in one order: a file gives them back in another
            square = self.ops.sum(grads[name] * grads[name])
            total = square if total is None else total + square
        return float(np.sqrt(self.ops.numpy(total)))

    def _check_step(self, step: int, batches: Sequence[Batch], loss: float, norm: float) -> None:
        """Before the update: the state behind the step before is the last good one."""
        rate = rate_at(self.settings, max(1, step - 1), self.steps)
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient is {norm}"
        if not math.isfinite(loss) or not math.isfinite(norm) or (norm == 0 < loss):
            sources = [source for batch in batches for source in batch.sources]
            some = ", ".join(sources[:4]) + (f" and {len(sources) - 4} more" if len(sources) > 4 else "")
            raise _Stopped(
                f"Step {step} stopped: its {what}, on {some}.",
                f"Try a lower --learning-rate (it was {rate:.2g}), or look at these examples." + self._kept(step),
            )
        if step > RECENT and min(*self.losses[1 - RECENT :], loss) > self.losses[0] + WORSE:
            raise _Stopped(
                f"Step {step} stopped: training diverges, the loss went from {self.losses[0]:.2f} to {loss:.2f}.",
                f"Give a lower --learning-rate: it was {rate:.2g}." + self._kept(step),
            )
        self.losses.append(loss)

    def _kept(self, step: int) -> str:
        return f" The state behind step {step - 1} is kept." if self.dest and step > 1 else ""

    # ---- beside the steps

    def _validate(self) -> Iterator[Validating]:
        """Ends with the mean loss over the held-out examples, and takes note of it."""
        settings = replace(self.settings, shuffle=False)
        rows = sorted(rows_of(self.data.valid, settings, 0), key=lambda row: -_length(self.data.valid, row))
        batches = batches_of(self.data.valid, rows, self.plan.micro_batch, self.virtual)
        value = shares = 0.0
        for done, batch in enumerate(batches):
            yield Validating(done, len(batches))
            value += self.objective.value(batch, self.learner.losses(self.state.params, batch))
            shares += self.objective.share(batch)
        loss = value / shares
        self.state = self.state.judged(loss)
        return loss

    def _due(self, saving: Saving, step: int) -> bool:
        if self.dest is None or step == self.steps:
            return False
        by_steps = saving.steps is not None and step % saving.steps == 0
        return by_steps or time.monotonic() - self.saved_at > 60 * saving.minutes

    def _save(self) -> Saved:
        path = states.save(self.dest, self.whole, self.ops)
        self.saved_at = time.monotonic()
        return Saved(self.whole.step, path)


class _Stopped(OnDeviceError):
    """A run that must not go on; the state before is good."""


def _length(examples: Sequence[Example], row: Sequence[int]) -> int:
    return sum(examples[i].length for i in row)


def _fitting(initial: Mapping[str, np.ndarray], method: Method) -> dict[str, np.ndarray]:
    """Raises BadOption where these are not the method's parameters."""
    wanted = {name: values.shape for name, values in method.initial().items()}
    given = {name: values.shape for name, values in initial.items()}
    if wanted != given:
        odd = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        raise BadOption(
            f"What to begin with does not fit these settings: {odd[0]} is {given.get(odd[0], 'not there')}, and should "
            f"be {wanted.get(odd[0], 'not there')} ({len(odd)} such).",
            "Give the --method, --rank and --target that it was trained with.",
        )
    return dict(initial)


def _check_lengths(session: Session, data: Data, virtual: int) -> None:
    """Raises BadOption for examples that, with so many virtual tokens, are longer than the model's context."""
    longest, most = max([*data.train, *data.valid], key=lambda e: e.length), session.config.context
    if virtual + longest.length - 1 > most:  # the last id is only a target
        front = f", {virtual} virtual ones come in front" if virtual else ""
        raise BadOption(
            f"{longest.source} has {longest.length} tokens{front}, and this model was made for {most}.",
            f"Give --max-length {max(most - virtual, 1)} or less.",
        )


def _check(session: Session, settings: Settings, teacher: Session | Teacher | None) -> None:
    """Raises Unsupported for what cannot go together."""
    if "training" not in session.backend.features:
        raise Unsupported(f"The backend {session.backend.name} cannot train.", "Use another: see ondevice doctor.")
    if session.config.positions and settings.pack:
        raise Unsupported("This model has a table of positions: sequences cannot be packed.", "Leave out --pack.")
    if settings.method == "prompt" and settings.objective != "next-token":
        raise Unsupported("Prompt tuning learns the next token only.", "Give --objective next-token, or --method lora.")
    if (settings.objective == "distill") != (teacher is not None):
        raise Unsupported("Distillation and a teacher belong together.", "Give --objective distill and --teacher.")
    if isinstance(teacher, Session) and teacher.config.vocab != session.config.vocab:
        raise Unsupported(
            f"The teacher knows {teacher.config.vocab} tokens, the model {session.config.vocab}: they do not match.",
            "Take a teacher of the same family.",
        )
