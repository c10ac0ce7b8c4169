"""Plans carried out in one folder. Text, sensitivities and what each cut loses are found out once and shared by all;
whatever is found is kept there, so that a killed run goes on from it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from math import ceil, prod
from pathlib import Path

import numpy as np

from ...checkpoint import open_checkpoint
from ...errors import BadOption, OnDeviceError
from ...models.parameters import expected
from ...registry import create_backend
from ...runtime.session import open_session
from ...tensors import Affine
from ..calibration import Sampling, samples, spread, windows
from ..progress import Progress, ended
from ..prune import depth, vocabulary, width
from ..prune.cutting import Cut
from ..prune.running import write
from ..prune.subject import Subject
from ..quantize import Given, quantize
from ..quantize import Options as QuantizeOptions
from ..quantize.allocation import Choice
from ..quantize.matrices import require_unquantized
from ..quantize.running import uniform
from ..quantize.sensitivity import Cost
from ..quantize.weighing import Weighed, weigh
from ..teaching import Lessons
from ..work import Work
from .estimating import Shared, share_out, share_out_alike
from .events import Outcome
from .judging import Judge, Told
from .options import Options
from .plans import BITS_ALONE, Plan

HURRIED = "bits alone, hurried"  # as it is called for people
OWN = 0.5  # as many tokens that the model says itself as there are of a given text, to calibrate on and to learn from
WRITING = 0.15  # of the time for healing, at most, that the original writes what is learnt from beside a text
ALONE = 0.35  # the same where there is no text
WRITTEN = 32768  # tokens that it writes then, at most
MORE = 1  # is added to the seed of what the original says for that: it is other than what is calibrated on
FLOOR = 64  # tokens that judging takes at least
LENGTH = 256  # tokens a window, at most, of text that is cut anew
LEFT = 0.25  # of a model's bytes, at least, whatever is cut


class Trial:
    """A context. judge and weighed are there once `prepare` is through, original is measured then. enough: whether the
    model has written its own text for long enough."""

    def __init__(
        self, source: Path, work: Work, options: Options, told: Told, enough: Callable[[], bool] = lambda: False
    ):
        self.source, self.work, self.options, self.told, self.enough = source, work, options, told, enough
        self.exact = create_backend("cpu", exact=True)
        self.subject = Subject(source, Plan(vocabulary=2).pruning(2, options.tokens, options.window))
        self.outcomes: list[Outcome] = [Outcome(**o) for o in work.record("outcomes") or []]
        self.looked: dict[Plan, Outcome] = {Plan(**p): Outcome(**o) for p, o in work.record("looked") or []}
        self.weighed: Weighed | None = None
        self._shared: dict[Plan, Shared] = {}
        self.method = "gptq"
        total = sum(self.subject.parameters[name].size for name in self.subject.parameters)
        self.original = Outcome("original", self.subject.checkpoint.nbytes, total, None, None, 0.0)

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self.subject.close()

    @property
    def best(self) -> Path:
        """The folder of the best model so far."""
        return self.work.path / "best"

    @property
    def made(self) -> list[Outcome]:
        """Of plans that there is a model of, or was."""
        return [o for o in self.outcomes if not o.failed]

    @property
    def losses(self) -> dict[Plan, float]:
        """Of single cuts."""
        return {plan: o.loss for plan, o in self.looked.items() if o.loss is not None}

    # ---- what all plans share

    def prepare(self) -> None:
        """Splits the text, measures the original, and weighs errors."""
        started = time.perf_counter()
        self.subject.check()
        if not self.options.requantize:
            require_unquantized(self.subject.parameters)
        self._check_target()
        samples = self._samples()
        self.ids, judged = samples["calibration"], samples["judged"]
        self.subject.calibrate_on(self.ids, samples["lessons"])
        self.judge = Judge(self._said(judged), judged.size, judged.shape[1])
        self.lessons = samples["lessons"]
        self.calibration = self.work.path / "calibration.txt"
        self.calibration.write_text(self._said(self.ids), encoding="utf-8")
        kept = self.work.record("original")
        if kept is None:
            found = self.judge.measured(self.source, "The original", self.told)
            seconds = time.perf_counter() - started
            measured = replace(self.original, loss=0.0, bits_per_byte=found.bits_per_byte, seconds=seconds)
            self.work.keep_record("original", kept := asdict(measured))
        self.original = Outcome(**kept)
        self.weighed = self._weighed()

    def _check_target(self) -> None:
        """What can be said before there is any work."""
        target, whole, least = self.options.target_bytes, self.original.nbytes, self.shared(BITS_ALONE).nbytes
        if target >= whole:
            raise BadOption(
                f"{self.source} takes {whole / 1e6:.2f} MB, which is no more than {target / 1e6:.2f} MB already.",
                "Give a smaller --target-size.",
            )
        if target < LEFT * least:
            raise unreachable(target, least)

    def _samples(self) -> dict[str, np.ndarray]:
        """Windows of the text: those that plans are judged on, from its end; all others, which may be learnt from; and
        some of those to calibrate on, beside some of the model's own words: rounded by a text alone, it keeps what that
        needs and may forget how to answer."""
        kept = self.work.arrays("samples")
        if kept is None:
            o, text = self.options, self.options.calibration
            length = min(o.window, self.subject.config.context)
            ids = windows(self.subject.session, text, length) if text else self._sampled(o.tokens, length)
            if len(ids) < 2 or ids.size < 4 * FLOOR:
                raise BadOption(
                    f"{ids.size} tokens of calibration are too few to choose by and to judge by.",
                    f"Give a text of {max(4 * FLOOR, 2 * ids.shape[1])} tokens or more.",
                )
            held = max(1, round(len(ids) * o.held_out))
            lessons, judged = ids[:-held], spread(ids[-held:], round(o.tokens * o.held_out))
            calibration = spread(lessons, round(o.tokens * (1 - o.held_out)))
            if text:
                own = self._sampled(round(OWN * calibration.size), min(length, LENGTH)).reshape(-1)
                own = own[: len(own) // length * length].reshape(-1, length)
                calibration = np.concatenate([calibration, own])
            kept = {"calibration": calibration, "judged": judged, "lessons": lessons}
            self.work.keep("samples", kept)
        return kept

    def _sampled(self, tokens: int, length: int, more: int = 0, enough: Callable[[], bool] | None = None) -> np.ndarray:
        """Windows that the model writes. more: another number, other windows."""
        seed = self.options.seed + more
        for event in samples(self.subject.session, None, tokens, length, seed, enough or self.enough):
            if isinstance(event, Sampling):
                self.told(Progress("The model writes its own calibration text", event.done, event.total, "tokens"))
        return event

    def _said(self, ids: np.ndarray) -> str:
        return self.subject.tokenizer.decode(ids.reshape(-1).tolist(), skip_special=False)

    def _weighed(self) -> Weighed:
        costs, hessians, table = self.work.arrays("costs"), self.work.arrays("hessians"), self.work.record("table")
        subject = self.subject
        if costs is None or hessians is None or table is None:
            names = self._matrices()
            made = weigh(subject.config, subject.parameters, names, self.exact, self.ids, self.options.seed, self.told)
            self.work.keep("hessians", made.hessians)
            parts = {f"{n}/{part}": a for n, c in made.costs.items() for part, a in vars(c).items()}
            self.work.keep("costs", parts)
            rows = {n: [(asdict(c.form), c.nbytes, c.cost) for c in several] for n, several in made.table.items()}
            self.work.keep_record("table", rows)
            return made
        read = {n: Cost(costs[f"{n}/outputs"], costs[f"{n}/inputs"]) for n in (k.rpartition("/")[0] for k in costs)}
        choices = {n: [Choice(Affine(**form), *rest) for form, *rest in several] for n, several in table.items()}
        return Weighed(read, hessians, choices)

    def _matrices(self) -> list[str]:
        """Names of what is quantized."""
        return list(uniform(self.subject.parameters, self.subject.family.names, QuantizeOptions())[0])

    # ---- cutting

    def cut(self, plan: Plan, foretell: bool = False) -> Cut:
        """What the plan leaves of the model. foretell: with channels as they were chosen before, by themselves, and
        nothing done to make up for those that go: enough to count by."""
        subject, cut = self.subject, Cut.nothing(self.subject.config, "bfloat16")
        if not plan.parts:
            return cut
        subject.options = plan.pruning(subject.config.vocab, self.options.tokens, self.ids.shape[1])
        if plan.vocabulary > 1:
            cut = replace(cut, tokens=self._tokens(plan.vocabulary))
        if plan.layers:
            dropped = self._dropped(plan.layers)
            cut = replace(cut, layers=tuple(i for i in cut.layers if i not in dropped))
        if plan.channels and foretell:
            known = self.work.arrays(f"channels {plan.channels}")
            return replace(cut, channels={i: known[str(i)] for i in cut.layers})
        if plan.channels:
            cut, _ = ended(width.channels(subject, cut), self.told)
            if len(plan.parts) == 1:
                self.work.keep(f"channels {plan.channels}", {str(i): kept for i, kept in cut.channels.items()})
        return cut

    def _tokens(self, share: int) -> np.ndarray:
        found = self.work.arrays(f"tokens {share}")
        if found is None:
            found = {"kept": ended(vocabulary.choose(self.subject), self.told)[0]}
            self.work.keep(f"tokens {share}", found)
        return found["kept"]

    def _dropped(self, count: int) -> list[int]:
        """The layers that go, of which fewer are the first."""
        found = self.work.record("dropped") or []
        if len(found) < count:
            found, _ = ended(depth.dispensable(self.subject, count), self.told)
            self.work.keep_record("dropped", found)
        return found[:count]

    def _written(self, cut: Cut) -> Path:
        folder = self.work.path / "cut"
        shutil.rmtree(folder, ignore_errors=True)
        ended(write(self.subject, cut, folder), self.told)
        return folder

    def _healed(self, cut: Cut, pruned: Path, lessons: Lessons) -> Path:
        """What was cut, taught. Training is loaded when it is used."""
        from ..prune.healing import heal

        folder, subject = self.work.path / "healed", self.subject
        shutil.rmtree(folder, ignore_errors=True)
        subject.options = replace(subject.options, heal=lessons)
        ended(heal(subject, cut.tokens, pruned, folder), self.told)
        return folder

    def _distilled(self, made: Path, lessons: Lessons) -> None:
        """Its scales are taught, where that makes it better."""
        from ..quantize.distilling import teach_scales

        folder = self.work.path / "distilled"
        shutil.rmtree(folder, ignore_errors=True)
        with open_session(self.source, backend="cpu") as original:
            found = ended(teach_scales(original, made, folder, lessons), self.told)
        if found.better:
            shutil.rmtree(made)
            folder.rename(made)

    def _lessons(self, ends: float) -> Lessons:
        """All of the text but what plans are judged on, and evenly spread in it windows that the original writes:
        taught by the text alone it learns what that talks about and forgets what else it could say. Where there is no
        text, more of what it writes."""
        text, length = self.options.calibration, min(LENGTH, self.ids.shape[1])
        own, left = self.work.arrays("own words"), ends - time.perf_counter()
        if own is None:
            wanted = round(OWN * self.lessons.size) if text else WRITTEN
            until = time.perf_counter() + (WRITING if text else ALONE) * left
            own = {"ids": self._sampled(wanted, length, MORE, lambda: time.perf_counter() > until)}
            self.work.keep("own words", own)
        parts, path = list(self.lessons), self.work.path / "lessons.txt"
        places = np.linspace(0, len(parts), len(own["ids"]), endpoint=False).round().astype(int)
        for place, words in zip(places[::-1].tolist(), own["ids"][::-1], strict=True):
            parts.insert(place, words)
        path.write_text(self._said(np.concatenate(parts)), encoding="utf-8")
        minutes = max(ends - time.perf_counter(), 1.0) / 60
        return Lessons(path, minutes=minutes, length=length, seed=self.options.seed, own=not text)

    # ---- carrying out

    def look(self, plan: Plan) -> Outcome:
        """A single cut and what it loses, all bits kept."""
        started = time.perf_counter()
        try:
            cut = self.cut(plan)
            folder = self._written(cut)
            outcome = self._measured(plan.name, folder, cut)
            shutil.rmtree(folder)
        except OnDeviceError as error:
            outcome = Outcome(plan.name, None, None, None, None, 0.0, failed=error.message)
        self.looked[plan] = replace(outcome, seconds=time.perf_counter() - started)
        self.work.keep_record("looked", [(asdict(p), asdict(o)) for p, o in self.looked.items()])
        return self.looked[plan]

    def shared(self, plan: Plan) -> Shared:
        """How bits would be shared out over what the plan leaves."""
        if self.weighed is None:
            return share_out_alike(self.subject.parameters, self._matrices(), self.options.target_bytes)
        if plan not in self._shared:
            cut = self.cut(plan, foretell=True)
            self._shared[plan] = share_out(self.weighed, self.subject.parameters, cut, self.options.target_bytes)
        return self._shared[plan]

    def run(self, plan: Plan, expected: float | None = None, method: str = "gptq", minutes: float = 0.0) -> Outcome:
        """The plan as a model, which is kept if it is the best so far. minutes: of healing, about."""
        started, made, self.method = time.perf_counter(), self.work.path / "made", method
        try:
            cut = self.cut(plan)
            shared = share_out(self.weighed, self.subject.parameters, cut, self.options.target_bytes)
            if shared.nbytes > self.options.target_bytes:
                raise unreachable(self.options.target_bytes, shared.nbytes)
            self._make(made, plan, cut, shared, method, 60 * minutes)
            outcome = replace(self._measured(plan.name, made, cut), expected=expected)
        except OnDeviceError as error:
            outcome = Outcome(plan.name, None, None, None, None, 0.0, expected, error.message)
        outcome = replace(outcome, seconds=time.perf_counter() - started)
        self._keep(made, outcome)
        return outcome

    def _make(self, made: Path, plan: Plan, cut: Cut, shared: Shared, method: str, seconds: float) -> None:
        """seconds: for learning, and for writing what is learnt."""
        shutil.rmtree(made, ignore_errors=True)  # it may be there since a kill
        source, ends = self._written(cut) if plan.parts else self.source, time.perf_counter() + seconds
        lessons = self._lessons(ends) if plan.healed else None
        alone = plan.healed and not plan.parts
        if lessons and not alone:
            source = self._healed(cut, source, lessons)
        if alone and self._leads(BITS_ALONE):
            shutil.copytree(self.best, made)
        else:
            given = Given(shared.plan, self.weighed.hessians, self.ids if cut.tokens is None else None)
            quantize(source, made, self._rounding(method), self.told, self.exact, given)
        if alone:
            self._distilled(made, lessons)

    def _leads(self, plan: Plan) -> bool:
        """Whether that plan's model is the best so far, and kept."""
        losses = {o.plan: o.loss for o in self.outcomes if o.loss is not None}
        return plan.name in losses and losses[plan.name] == min(losses.values())

    def _rounding(self, method: str) -> QuantizeOptions:
        if self.weighed is None:
            return QuantizeOptions(method, requantize=True)
        length = min(LENGTH, self.ids.shape[1])
        return QuantizeOptions(
            method, calibration=self.calibration, tokens=self.ids.size, length=length, requantize=True
        )

    def hurried(self) -> Outcome | None:
        """What there is still time for when it is up: bits alone, the nearest values where nothing better is finished.
        None: nothing fits."""
        started, made, shared = time.perf_counter(), self.work.path / "made", self.shared(BITS_ALONE)
        if shared.nbytes > self.options.target_bytes:
            return None
        self.work.keep_record("begun", True)
        shutil.rmtree(made, ignore_errors=True)
        quantize(self.source, made, self._rounding(self.method), given=Given(shared.plan, {}, hurried=True))
        seconds = time.perf_counter() - started
        outcome = Outcome(HURRIED, shared.nbytes, self.original.parameters, None, None, seconds)
        made.rename(self.best)
        self.outcomes.append(outcome)
        return outcome

    def _measured(self, name: str, folder: Path, cut: Cut) -> Outcome:
        started = time.perf_counter()
        found = self.judge.measured(folder, name, self.told)
        loss = self.judge.loss(found.bits_per_byte, self.original.bits_per_byte)
        with open_checkpoint(folder) as checkpoint:
            nbytes = checkpoint.nbytes
        parameters = sum(prod(shape) for shape in expected(cut.made).values())
        return Outcome(name, nbytes, parameters, loss, found.bits_per_byte, time.perf_counter() - started)

    def _keep(self, made: Path, outcome: Outcome) -> None:
        """The better model of two; what is written down of them is true whenever the work is killed."""
        losses = [o.loss for o in self.outcomes if o.loss is not None]
        if outcome.loss is not None and outcome.loss < min(losses, default=float("inf")):
            shutil.rmtree(self.best, ignore_errors=True)
            made.rename(self.best)
        self.outcomes.append(outcome)
        self.work.keep_record("outcomes", [asdict(o) for o in self.outcomes])
        for folder in ("made", "cut", "healed", "distilled"):
            shutil.rmtree(self.work.path / folder, ignore_errors=True)


def unreachable(target: int, least: int) -> BadOption:
    return BadOption(
        f"No plan takes {target / 1e6:.2f} MB or less: 2 bits for every matrix take {least / 1e6:.2f} MB.",
        f"Give --target-size {ceil(least / 1e4) / 100:.2f}MB or more, or a smaller model.",
    )
