"""A text through a model, explained: tokens, the next one, the prediction layer by layer, attention, nearest tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...errors import BadOption, ContextFull
from ...runtime.engine import require_known, require_numbers
from ...runtime.session import Session
from ...runtime.tokenizer import Tokenizer
from ...schemes import rows, take_rows, to_float
from ..inspect.routing import softmax
from .seeing import Seen, see

MOST_TOKENS = 256  # every token looks at every other, in every head: the page and the memory grow with the square
MOST_LENSES = 64  # positions, from the end, that get the logit lens
GUESSES = 3  # for each stage and position
NEIGHBOURS = 5
CHUNK = 1 << 22  # numbers of the embedding that are looked through at a time


@dataclass(frozen=True)
class Progress:
    done: int  # stages of the lens
    total: int


@dataclass(frozen=True)
class Token:
    """text: on one line, for people."""

    id: int
    text: str
    special: bool


@dataclass(frozen=True)
class Guess:
    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Lens:
    """What the head would say at each stage (the embedding, then each block), for the positions from `first` on (Logit
    lens, nostalgebraist 2020). guesses [stage][position]: the likeliest. chance, rank [stages, positions]: of the token
    that the whole model finds likeliest there; rank 0 is first."""

    first: int
    guesses: tuple[tuple[tuple[Guess, ...], ...], ...]
    chance: np.ndarray = field(repr=False)
    rank: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Neighbour:
    id: int
    text: str
    cosine: float


@dataclass(frozen=True)
class Explanation:
    """focus: positions that are looked at closely. attention: layer -> [H, T, T]. neighbours: of each different token.
    likeness [stages, len(focus)]: cosine of the stream at each focus position with the one at the first."""

    tokens: tuple[Token, ...]
    next: tuple[Guess, ...]
    lens: Lens
    attention: dict[int, np.ndarray] = field(repr=False)
    neighbours: dict[int, tuple[Neighbour, ...]]
    focus: tuple[int, ...]
    likeness: np.ndarray = field(repr=False)

    def looks(self, position: int) -> np.ndarray:
        """[T]: what a position's attention comes to, averaged over all heads of all layers; empty without attention."""
        rows = [by_head[:, position].mean(0) for by_head in self.attention.values()]
        return np.mean(rows, 0) if rows else np.zeros(0)

    def heads(self, position: int, most: int = 5) -> list[tuple[int, int, int, float]]:
        """The heads that look hardest at one earlier token: (layer, head, token, share). The first token, where heads
        rest that have nothing to do, and the token itself do not count."""
        found = []
        for layer, by_head in self.attention.items():
            for head, row in enumerate(by_head[:, position, 1:position]):
                if len(row):
                    found.append((layer, head, int(row.argmax()) + 1, float(row.max())))
        return sorted(found, key=lambda x: -x[3])[:most]


def explain(
    session: Session, ids: Sequence[int], focus: Sequence[int] = (), top: int = 10
) -> Iterator[Progress | Explanation]:
    """Ends with the Explanation. focus: positions to look at closely; (): the last. top: how many next tokens.

    Raises BadOption for a text without tokens or out of the vocabulary, ContextFull for one that is too long."""
    _check(session, ids)
    seen = see(session.decoder, ids)
    pieces = session.tokenizer
    stages = len(seen.stream)
    lens = _Lens(session, max(0, len(ids) - MOST_LENSES))
    final = lens.chances(seen, stages - 1)
    guesses, chance, rank = [], [], []
    for stage in range(stages):
        yield Progress(stage, stages)
        chances = final if stage == stages - 1 else lens.chances(seen, stage)
        guesses.append(tuple(tuple(_guesses(pieces, row, GUESSES)) for row in chances))
        answers = np.take_along_axis(chances, final.argmax(-1)[:, None], -1)
        chance.append(answers[:, 0])
        rank.append((chances > answers).sum(-1))
    yield Progress(stages, stages)
    focus = tuple(focus) or (len(ids) - 1,)
    special = pieces.special_ids
    yield Explanation(
        tuple(Token(id, pieces.piece(id), id in special) for id in ids),
        tuple(_guesses(pieces, final[-1], top)),
        Lens(lens.first, tuple(guesses), np.array(chance), np.array(rank)),
        seen.attention,
        _neighbours(session, ids),
        focus,
        _likeness(session, seen, focus),
    )


def _check(session: Session, ids: Sequence[int]) -> None:
    most = min(MOST_TOKENS, session.config.context)
    if not ids:
        raise BadOption("The text has no tokens.", "Give some text.")
    if len(ids) > most:
        raise ContextFull(
            f"The text has {len(ids)} tokens and {most} can be explained at once.", "Give a shorter text."
        )
    require_known(ids, session.config.vocab)


class _Lens:
    """The head on what a stage gives, from position `first` on."""

    def __init__(self, session: Session, first: int):
        self.decoder, self.first = session.decoder, first

    def chances(self, seen: Seen, stage: int) -> np.ndarray:
        """[positions, V] float64"""
        x = seen.stream[stage]
        picked = np.arange(self.first, x.shape[1], dtype=np.int32)
        flat = self.decoder.ops.take(x.reshape(-1, self.decoder.config.width), picked)
        logits = self.decoder.ops.numpy(self.decoder.head(self.decoder.scope(), flat))
        return softmax(require_numbers(logits).astype(np.float64))


def _guesses(pieces: Tokenizer, chances: np.ndarray, most: int) -> Iterator[Guess]:
    """The likeliest tokens of one position, the likeliest first."""
    some = np.argpartition(-chances, min(most, len(chances) - 1))[:most]
    for id in some[np.argsort(-chances[some], kind="stable")]:
        yield Guess(int(id), pieces.piece(int(id)), float(chances[id]))


def _neighbours(session: Session, ids: Sequence[int]) -> dict[int, tuple[Neighbour, ...]]:
    """Of each different token: the others whose embeddings point most nearly the same way."""
    table, unique = session.parameters["embed"], list(dict.fromkeys(ids))
    own = _directions(rows(table, unique))
    step = max(1, CHUNK // table.shape[1])
    cosines = np.empty((table.shape[0], len(unique)), np.float32)
    for at in range(0, table.shape[0], step):
        some = np.arange(at, min(at + step, table.shape[0]))
        cosines[some] = _directions(to_float(take_rows(table, some))) @ own.T
    cosines[unique, np.arange(len(unique))] = -2
    found = {}
    for column, id in enumerate(unique):
        best = np.argsort(-cosines[:, column], kind="stable")[:NEIGHBOURS]
        found[id] = tuple(Neighbour(int(n), session.tokenizer.piece(int(n)), float(cosines[n, column])) for n in best)
    return found


def _likeness(session: Session, seen: Seen, focus: tuple[int, ...]) -> np.ndarray:
    by_stage = []
    for x in seen.stream:
        picked = session.backend.take(x.reshape(-1, session.config.width), np.array(focus, np.int32))
        ways = _directions(session.backend.numpy(picked).astype(np.float32))
        by_stage.append(ways @ ways[0])
    return np.array(by_stage)


def _directions(vectors: np.ndarray) -> np.ndarray:
    """[N, D] -> each of length 1; zeros stay."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)


def positions_of(tokenizer: Tokenizer, ids: Sequence[int], word: str) -> tuple[int, ...]:
    """The tokens in which a word ends, wherever it stands in the text. Raises BadOption where it does not."""
    ends = np.cumsum([len(tokenizer.bytes_of(id)) for id in ids])
    text = b"".join(tokenizer.bytes_of(id) for id in ids).decode("utf-8", "surrogateescape")
    found = []
    for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) if word else ():
        last = len(text[: match.end()].encode("utf-8", "surrogateescape")) - 1
        found.append(int(np.searchsorted(ends, last, side="right")))
    if not found:
        raise BadOption(f"The text has no word {word!r}.", "Give --word one of its words.")
    return tuple(dict.fromkeys(found))
