"""One figure asked for: which kinds of cut, and how much of each, lose least for what they save.

Every kind that this model has is tried alone at two sizes, and what it loses is measured on text that none was chosen
by: nats more than the original's for the same text, a token of the original, which also compares vocabularies. Losses
of several cuts are added up; of all that save enough together, those that should lose least are made. Small models,
whose embeddings weigh most, lose tokens first (as in COMPACT, arXiv 2509.06836: rare tokens, then channels by what the
common ones need; here the channels are chosen on text of the calibration set, in which common tokens are common).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import log, prod
from pathlib import Path
from shutil import rmtree
from tempfile import gettempdir
from typing import Any

from ...checkpoint.write import scratch
from ...errors import BadOption, Unsupported
from ...models.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from ...models.parameters import expected
from ...runtime.session import open_session
from ..evaluate.text import Evaluation, evaluate
from ..progress import Progress
from .cutting import Cut
from .events import Score, Scores
from .options import Amount, Options
from .subject import Subject

HELD_OUT = 0.25  # of the calibration's windows: what cuts are judged on
HEAVY = 0.05  # of all parameters: a kind that weighs less is left alone
SHARES = (0.1, 0.25)  # of channels or experts
DEPTHS = (1 / 30, 1 / 10)  # of layers

Make = Callable[[Subject], Generator[Progress, None, tuple[Cut, list[Scores]]]]
Write = Callable[[Subject, Cut, Path], Generator[Progress, None, Any]]


@dataclass(frozen=True)
class Rung:
    """So much of one kind of cut: name for people; options: what it adds to what was asked. cut: what it leaves; loss:
    nats a token."""

    kind: str
    name: str
    options: Mapping[str, Amount]
    cut: Cut | None = field(default=None, repr=False)
    loss: float = 0.0

    @property
    def saved(self) -> int:
        return parameters(self.cut.config) - parameters(self.cut.made)


def choose(
    subject: Subject, make: Make, write: Write, dest: Path | None
) -> Generator[Progress, None, tuple[Options, Scores, tuple[str, ...]]]:
    """What to ask for instead of `target`, by what it was chosen, and what could not be tried. make: cuts as the
    subject's options say; write: such a cut as a folder. Raises BadOption where nothing saves enough: it says what
    would."""
    asked, total = subject.options, parameters(subject.config)
    wanted = asked.target.of(total)
    text, tokens = yield from _held_out(subject)
    original = yield from _nats(subject.path, text, "The original")
    tried, notes = [], []
    with scratch(dest or Path(gettempdir()) / "pruned") as folder:
        for rung in rungs(subject.config):
            try:
                subject.options = replace(asked, target=None, heal=None, **rung.options)
                cut, _ = yield from make(subject)
                made = folder / str(len(tried))
                yield from write(subject, cut, made)
            except (BadOption, Unsupported) as error:
                notes.append(f"{rung.name}: not tried. {error.message}")
                continue
            nats = yield from _nats(made, text, rung.name)
            rmtree(made)
            tried.append(replace(rung, cut=cut, loss=max((nats - original) / tokens, 0.0)))
    chosen = best(tried, wanted)
    if chosen is None:
        most = max((saved(way) for way in ways(tried)), default=0)
        raise BadOption(
            f"No cuts save {wanted / total:.0%} of this model; those that can be tried save {most / total:.0%}.",
            "Give a smaller --target, or name what is to go.",
        )
    named = {key: value for rung in chosen for key, value in rung.options.items()}
    rows = [Score(r.name, r.loss / max(100 * r.saved / total, 1e-9), int(r not in chosen)) for r in tried]
    return replace(asked, target=None, **named), Scores("cut", "nats for 1 %", tuple(rows), "left out"), tuple(notes)


def parameters(config: ModelConfig) -> int:
    return sum(prod(shape) for shape in expected(config).values())


def rungs(config: ModelConfig) -> Iterator[Rung]:
    """What may be tried on a model of this kind."""
    layers, total = len(config.layers), parameters(config)
    if config.vocab * config.width * (1 if config.tied else 2) >= HEAVY * total:
        for share in (2, 3):
            kept = config.vocab // share
            yield Rung("vocabulary", f"{kept:,} tokens stay", {"vocabulary": Amount(kept)})
    for count in dict.fromkeys(max(1, round(share * layers)) for share in DEPTHS):
        if count < layers:
            yield Rung("layers", f"{count} layer{'s go' if count > 1 else ' goes'}", {"layers": Amount(count)})
    if len({f.hidden for layer in config.layers if isinstance(f := layer.feed_forward, MLPConfig)}) == 1:
        yield from (Rung("channels", f"{s:.0%} of channels go", {"channels": Amount(share=s)}) for s in SHARES)
    if {m.kv_heads for layer in config.layers if isinstance(m := layer.mixer, AttentionConfig)} - {1}:
        yield Rung("heads", "1 key head goes", {"heads": Amount(1)})
    if any(isinstance(layer.feed_forward, MoEConfig) for layer in config.layers):
        yield from (Rung("experts", f"{s:.0%} of experts go", {"experts": Amount(share=s)}) for s in SHARES)


def ways(tried: Sequence[Rung]) -> Iterator[tuple[Rung, ...]]:
    """At most one of a kind."""
    kinds = dict.fromkeys(rung.kind for rung in tried)
    for way in product(*([None, *(rung for rung in tried if rung.kind == kind)] for kind in kinds)):
        if any(way):
            yield tuple(rung for rung in way if rung)


def saved(way: Sequence[Rung]) -> int:
    """Parameters that several cuts save together."""
    first = way[0].cut
    fields = {"vocabulary": "tokens"}
    parts = {name: getattr(rung.cut, name) for rung in way for name in [fields.get(rung.kind, rung.kind)]}
    return parameters(first.config) - parameters(replace(Cut.nothing(first.config), **parts).made)


def best(tried: Sequence[Rung], wanted: int) -> tuple[Rung, ...] | None:
    """The way that saves `wanted` parameters or more and should lose least; None: there is none."""
    enough = [way for way in ways(tried) if saved(way) >= wanted]
    return min(enough, key=lambda way: (sum(rung.loss for rung in way), saved(way)), default=None)


def _held_out(subject: Subject) -> Generator[Progress, None, tuple[str, int]]:
    """A text to judge by, which is no longer calibrated on; its tokens."""
    windows = yield from subject.windows()
    count = max(1, round(HELD_OUT * len(windows)))
    if len(windows) < 2:
        raise BadOption(
            f"{windows.size} tokens of calibration are too few to choose by and to judge by.",
            f"Give --tokens {2 * windows.shape[1]} or more, and a text that has them.",
        )
    subject.calibrate_on(windows[:-count])
    held = windows[-count:].reshape(-1)
    return subject.tokenizer.decode(held.tolist(), skip_special=False), held.size


def _nats(folder: Path, text: str, name: str) -> Generator[Progress, None, float]:
    """For the whole of a text."""
    with open_session(folder, backend="cpu") as session:
        for event in evaluate(session, text, min(512, session.config.context)):
            if isinstance(event, Evaluation):
                break
            yield Progress(f"{name}: measuring", event.done, event.total, "windows")
    return event.bits_per_byte * log(2) * event.bytes
