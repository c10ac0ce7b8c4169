"""Which tokens of a vocabulary stay: those that a text needs, or those that matter most to the model's own use.

How often a token will come is told by two counts: of the calibration text, which knows what is talked about but has
seen few words, and of what the model expects at every place of it, which has seen many.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from ...errors import BadOption
from ...runtime.session import Session
from ..calibration import samples
from ..calibration.samples import read_text
from ..evaluate.text import hidden, log_softmax, logits_of
from ..progress import Progress
from .events import Score, Scores
from .subject import Subject
from .tokens import Encoding, closed, encoding, required

ROWS = 64  # predictions whose logits are held at once
SHOWN = 20  # tokens that go, the likeliest first, that are named
TILE = 64  # rows that matrix kernels like: on others, the last bits of logits may change
EVERYTHING = 1 << 30  # tokens: more than any calibration text

Choice = Generator[Progress, None, tuple[np.ndarray, Scores]]


def choose(subject: Subject) -> Choice:
    """Ids that stay, ascending, and by what they were chosen. Raises BadOption for a vocabulary that is too small for
    the model to speak at all, or no smaller than what there is, Unsupported for tokenizers that can't be cut."""
    how = encoding(subject.files)
    needed = required(how, subject.tokenizer, subject.files, subject.hf_config)
    needed = {id for id in needed if id < subject.config.vocab}  # some tokenizers know more than their model
    if subject.options.keep_vocabulary:
        kept, weights = _needed_by_text(subject, how, needed)
    else:
        wanted = _wanted(subject, needed)
        weights = subject.expected
        if weights is None:
            weights = subject.expected = yield from expected_counts(subject)
        kept = _likeliest(how, needed, weights, wanted)
    return np.array(sorted(kept), np.int64), _scores(subject, kept, weights)


def _wanted(subject: Subject, needed: set[int]) -> int:
    total = subject.config.vocab
    wanted = subject.options.vocabulary.of(total)
    if wanted >= total:
        raise BadOption(f"--vocabulary {wanted}: this model has {total} tokens, no more.", "Give a smaller number.")
    if wanted < len(needed):
        raise BadOption(
            f"--vocabulary {wanted}: bytes, special tokens and the chat template alone need {len(needed)} tokens.",
            f"Give {len(needed)} or more.",
        )
    return wanted


def _needed_by_text(subject: Subject, how: Encoding, needed: set[int]) -> tuple[set[int], np.ndarray]:
    path = subject.options.keep_vocabulary
    ids = np.array(subject.tokenizer.encode(read_text(path)), np.int64)
    ids = ids[ids < subject.config.vocab]
    if not len(ids):
        raise BadOption(f"{path} is empty: no token would stay but those that every text needs.", "Give a text.")
    kept = needed | closed(how, set(ids.tolist()))
    counts = np.bincount(ids, minlength=subject.config.vocab).astype(float)
    learned_first = 1 / (1 + np.arange(len(counts))) / len(counts)
    return _likeliest(how, kept, counts + learned_first, -(-len(kept) // TILE) * TILE), counts


def expected_counts(subject: Subject) -> Generator[Progress, None, np.ndarray]:
    """How often each token is to be expected in a text as long as the calibration's, float64 [V]."""
    windows = yield from subject.windows()
    o, vocab = subject.options, subject.config.vocab
    counts = np.bincount(_all_ids(subject, windows).reshape(-1), minlength=vocab).astype(np.float64)
    expected = np.zeros(vocab)
    for done, window in enumerate(windows):
        yield Progress("Asking the model which tokens it expects", done * o.length, windows.size, "tokens")
        expected += _expected(subject.session, window)
    expected[subject.tokenizer.vocab_size :] = 0  # rows that no token has: embeddings are padded
    return counts + expected * counts.sum() / expected.sum()


def _all_ids(subject: Subject, windows: np.ndarray) -> np.ndarray:
    """Counting is cheap: all of a text, where there is one, but for what is held out."""
    if subject.counted is not None:
        return subject.counted
    if subject.options.calibration is None:
        return windows
    *_, ids = samples(subject.session, subject.options.calibration, EVERYTHING, windows.shape[1])
    return ids


def _expected(session: Session, window: np.ndarray) -> np.ndarray:
    """The probabilities of the next token, summed over a window [T] -> float64 [V]."""
    states, total = hidden(session.decoder, window), 0
    for at in range(0, len(window), ROWS):
        rows = np.arange(at, min(at + ROWS, len(window)), dtype=np.int32)
        total = total + np.exp(log_softmax(logits_of(session.decoder, states, rows))).sum(0, dtype=np.float64)
    return total


def _likeliest(how: Encoding, needed: set[int], weights: np.ndarray, wanted: int) -> set[int]:
    """The needed and then, in the order of their weights, whatever still fits with all that it is made through."""
    kept = set(needed)
    for id in np.argsort(-weights, kind="stable").tolist():
        if len(kept) == wanted:
            break
        if id not in kept and (id in how.texts or weights[id]):
            more = how.needs(id) - kept
            if len(kept) + len(more) <= wanted:
                kept |= more
    return kept


def _scores(subject: Subject, kept: set[int], weights: np.ndarray) -> Scores:
    total = max(weights.sum(), 1e-30)
    gone = [id for id in np.argsort(-weights, kind="stable").tolist() if id not in kept]
    share = sum(weights[id] for id in gone) / total
    rows = [Score("all that go", float(share), len(kept), subject.config.vocab)]
    rows += [
        Score(repr(subject.tokenizer.piece(id)), float(weights[id] / total), 0) for id in gone[:SHOWN] if weights[id]
    ]
    return Scores("tokens", "share of the text", tuple(rows))
