"""Files of training data -> examples: ids, and which of them the model must learn to say.

A line is a JSON object of one of these kinds (Hugging Face's names for the fields):

    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …], "tools": […]}
    {"prompt": "…" or [messages], "completion": "…" or [messages]}
    {"text": "…"}
    {"prompt": …, "chosen": …, "rejected": …}                          a preference
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import noise
from ..errors import BadFile, OnDeviceError
from ..runtime.engine import require_known
from ..runtime.session import Session
from . import encode
from .encode import Encoded
from .sources import Line, find

MOST_HELD_OUT = 256  # examples: a validation should cost little against the steps between two of them


@dataclass(frozen=True)
class Example:
    """sequences: one, or two for a preference (chosen, rejected). source: "FILE:LINE", for messages."""

    sequences: tuple[Encoded, ...]
    source: str

    @property
    def length(self) -> int:
        return max(s.length for s in self.sequences)


@dataclass
class Data:
    """Examples by split, and what became of the rest. `digest` tells one set of files from another."""

    train: list[Example]
    valid: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    truncated: int = 0  # examples that were longer than max_length
    dropped: int = 0  # examples of which nothing to learn was left
    held_out: bool = False  # valid was taken from train
    digest: str = ""

    @property
    def tokens(self) -> int:
        return sum(s.length for example in self.train for s in example.sequences)


def load_data(
    path: str | Path, session: Session, max_length: int, preference: bool = False, validation: float = 0.05,
    seed: int = 0, progress: Callable[[int], None] = lambda lines: None,
) -> Data:  # fmt: skip
    """Examples from what `sources.find` finds at `path`.

    `progress` hears how many lines have been read. Raises BadFile, naming file and line, for what cannot be learnt
    from, and BadOption where there is nothing at all.
    """
    reader = _Reader(session, max_length, preference, progress)
    splits = {split: [*reader.read(lines)] for split, lines in find(path).items()}
    if not splits["train"]:
        raise BadFile(f"{path} holds no example to learn from.", _nothing_left(reader))
    data = Data(**splits, truncated=reader.truncated, dropped=reader.dropped, digest=reader.digest.hexdigest())
    return data if data.valid else _hold_out(data, validation, seed)


def _nothing_left(reader: _Reader) -> str:
    if reader.dropped:
        return f"All {reader.dropped} examples are longer than --max-length before anything to learn: give more."
    return "Give one JSON object a line: see docs/train.md."


def _hold_out(data: Data, share: float, seed: int) -> Data:
    """Some of the training examples as validation, the same for the same seed."""
    count = min(round(len(data.train) * share), MOST_HELD_OUT, len(data.train) - 1)
    if share and not count and len(data.train) >= 8:
        count = 1
    if not count:
        return data
    chosen = set(noise.generator(seed, "held out").permutation(len(data.train))[:count].tolist())
    valid = [e for i, e in enumerate(data.train) if i in chosen]
    return replace(data, train=[e for i, e in enumerate(data.train) if i not in chosen], valid=valid, held_out=True)


class _Reader:
    """Lines into examples, counting what was cut."""

    def __init__(self, session: Session, max_length: int, preference: bool, progress: Callable[[int], None]):
        self.session, self.max_length, self.preference, self.progress = session, max_length, preference, progress
        self.truncated = self.dropped = self.lines = 0
        self.digest = hashlib.sha256()

    def read(self, lines: Iterable[Line]) -> Iterator[Example]:
        for source, line in lines:
            self.digest.update(line.strip() + b"\n")
            self.lines += 1
            self.progress(self.lines)
            for sequences in self._encoded(line, source):
                cut = tuple(s.cut(self.max_length) for s in sequences)
                self.truncated += any(s.length > self.max_length for s in sequences)
                if all(s.learns for s in cut):
                    yield Example(cut, source)
                else:
                    self.dropped += 1
        self.digest.update(b"\0")

    def _encoded(self, line: bytes, source: str) -> list[tuple[Encoded, ...]]:
        """One line as examples: several where a conversation must be learnt turn by turn, or a text is long."""
        try:
            value = _object(line)
            if self.preference:
                made = [encode.preference(self.session, value)]
            else:
                made = [(s,) for s in encode.example(self.session, value, self.max_length)]
            for sequences in made:
                for sequence in sequences:
                    require_known(sequence.ids.tolist(), self.session.config.vocab)
            return made
        except OnDeviceError as error:
            raise BadFile(f"{source}: {error.message}", error.hint or "Correct or remove this line.") from None


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BadFile("this is not UTF-8 text.", "Convert the file first: iconv -t utf-8.") from None
    except (ValueError, RecursionError) as error:
        raise BadFile(f"this is not JSON ({error}).", "Every line must be one JSON object.") from None
    if not isinstance(value, dict):
        raise BadFile("this is not a JSON object.", "Every line must be one: {…}.")
    return value
