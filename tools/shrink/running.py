"""The whole of it: plans are tried one after the other while there is time; the best becomes the new folder.

What a plan loses is measured on text that none was shown: how many nats more than the original's it takes to say the
same text, for each token of the original. That compares models that cut text differently; on a model's own words it is
what the KL divergence is in the mean.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from math import log
from pathlib import Path

from ...checkpoint import open_checkpoint
from ...errors import BadOption, OnDeviceError
from ...models.families import family_of
from ...runtime.session import open_session
from ..calibration import Sampling, samples
from ..evaluate.text import Evaluation, evaluate
from ..prune import Progress, prune
from ..prune.events import Result as Pruned
from ..quantize import Options as QuantizeOptions
from ..quantize import quantize
from .options import Options
from .plans import Plan, proposals
from .report import write_report

FLOOR = 64  # tokens that judging takes at least


@dataclass(frozen=True)
class Outcome:
    """A plan that was tried. loss: nats a token of the original more than the original takes for the held-out text.
    failed: why there is no such model (nbytes and loss are then None)."""

    plan: str
    nbytes: int | None
    parameters: int | None
    loss: float | None
    bits_per_byte: float | None
    seconds: float
    failed: str = ""


@dataclass(frozen=True)
class Result:
    """outcomes: in the order of trial; chosen: the plan that is now at `path`. original: its outcome. left: plans that
    there was no time for."""

    path: Path
    chosen: str
    original: Outcome
    outcomes: tuple[Outcome, ...]
    left: tuple[str, ...]
    seconds: float


def shrink(source: Path, dest: Path, options: Options) -> Iterator[Progress | Outcome | Result]:
    """Tells each Outcome when it is known; ends with the Result. `dest` appears complete, with REPORT.md, or not at
    all. Raises BadOption where no plan reaches the size."""
    started = time.perf_counter()
    if dest.exists() or dest.is_symlink():
        raise OnDeviceError(f"{dest} exists already.", "Choose another name, or remove it first.")
    parent = dest.absolute().parent
    if not parent.is_dir():
        raise OnDeviceError(f"There is no folder {parent} to write to.", "Create it first.")
    with open_checkpoint(source) as checkpoint:
        family, hf = family_of(checkpoint)
        plans = proposals(family.config(hf), options.target_bytes)
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", suffix=".partial", dir=parent) as folder:
        trial = Trial(source, Path(folder), options)
        yield from trial.prepare()
        outcomes, left = yield from _tried(trial, plans, started)
        best = min((o for o in outcomes if o.loss is not None), key=lambda o: o.loss, default=None)
        if best is None:
            raise BadOption(outcomes[0].failed, "Give a larger --target-size, or start from a smaller model.")
        seconds = time.perf_counter() - started
        result = Result(dest, best.plan, trial.original, tuple(outcomes), tuple(left), seconds)
        write_report(trial.best, result, options)
        trial.best.rename(dest)
    yield result


def _tried(
    trial: Trial, plans: list[Plan], started: float
) -> Generator[Progress | Outcome, None, tuple[list[Outcome], list[str]]]:
    outcomes: list[Outcome] = []
    for at, plan in enumerate(plans):
        longest = max((o.seconds for o in outcomes), default=0.0)
        if outcomes and time.perf_counter() - started + longest > 60 * trial.options.minutes:
            return outcomes, [plan.name for plan in plans[at:]]
        outcome = yield from trial.run(plan)
        outcomes.append(outcome)
        yield outcome
    return outcomes, []


class Trial:
    """Plans carried out in one folder, of which the best model so far is kept."""

    def __init__(self, source: Path, folder: Path, options: Options):
        self.source, self.folder, self.options = source, folder, options
        self.calibration, self.best = folder / "calibration.txt", folder / "best"
        self.least = float("inf")

    def prepare(self) -> Iterator[Progress]:
        """Splits the text, and measures the original."""
        o, started = self.options, time.perf_counter()
        with open_session(self.source, backend="cpu") as session:
            for event in samples(session, o.calibration, o.tokens, o.length, o.seed):
                if isinstance(event, Sampling):
                    yield Progress("The model writes its own calibration text", event.done, event.total, "tokens")
            flat = event.reshape(-1)
            held = max(FLOOR, int(len(flat) * o.held_out))
            if len(flat) < 4 * FLOOR:
                raise BadOption(
                    f"{len(flat)} tokens of calibration are too few to choose by and to judge by.",
                    f"Give a text of {4 * FLOOR} tokens or more.",
                )
            decode = session.tokenizer.decode
            self.calibration.write_text(decode(flat[:-held].tolist(), skip_special=False), encoding="utf-8")
            self.text = decode(flat[-held:].tolist(), skip_special=False)
            self.held, self.length = held, min(o.length, held)
            found = yield from _measured(session, self.text, self.length, "The original")
            self.nats = _nats(found)
            parameters = sum(session.parameters[name].size for name in session.parameters)
            seconds = time.perf_counter() - started
            nbytes = session.checkpoint.nbytes
            self.original = Outcome("original", nbytes, parameters, 0.0, found.bits_per_byte, seconds)

    def run(self, plan: Plan) -> Generator[Progress, None, Outcome]:
        started, made, events = time.perf_counter(), self.folder / "made", []
        try:
            source, parameters = self.source, self.original.parameters
            if plan.cuts:
                source = self.folder / "pruned"
                o = self.options
                pruned = yield from _last(
                    prune(self.source, source, plan.pruning(self.calibration, o.tokens, self._window()))
                )
                parameters = pruned.after.parameters
            yield Progress(f"{plan.name}: sharing out bits", 0, 1)
            result = quantize(source, made, self._bits(), events.append)
            with open_session(made, backend="cpu") as session:
                found = yield from _measured(session, self.text, self.length, plan.name)
        except BadOption as error:
            return Outcome(plan.name, None, None, None, None, time.perf_counter() - started, error.message)
        finally:
            shutil.rmtree(self.folder / "pruned", ignore_errors=True)
        loss = (_nats(found) - self.nats) / self.held
        self._keep(made, loss)
        return Outcome(plan.name, result.nbytes, parameters, loss, found.bits_per_byte, time.perf_counter() - started)

    def _window(self) -> int:
        return min(self.options.length, 256)

    def _bits(self) -> QuantizeOptions:
        o = self.options
        given = {"calibration": self.calibration, "tokens": o.tokens, "length": self._window()}
        return QuantizeOptions(target_bytes=o.target_bytes, sensitivity_tokens=o.tokens // 4, requantize=True, **given)

    def _keep(self, made: Path, loss: float) -> None:
        if loss < self.least:
            shutil.rmtree(self.best, ignore_errors=True)
            made.rename(self.best)
            self.least = loss
        else:
            shutil.rmtree(made)


def _last(work: Iterator[Progress | Pruned]) -> Generator[Progress, None, Pruned]:
    for event in work:
        if isinstance(event, Progress):
            yield event
    return event


def _measured(session, text: str, length: int, name: str) -> Generator[Progress, None, Evaluation]:
    for event in evaluate(session, text, length):
        if isinstance(event, Evaluation):
            return event
        yield Progress(f"{name}: measuring", event.done, event.total, "windows")


def _nats(found: Evaluation) -> float:
    """For the text as a whole: what is not scored is as dear as the rest."""
    return found.bits_per_byte * log(2) * found.bytes
