"""Token ids to calibrate on: from a text, from conversations, or from the model's own mouth.

A model that samples from itself needs no data and no download, and what it says is what it was trained on (LLM-QAT,
Liu et al. 2023).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ... import noise
from ...backends.base import SamplingParams, Step
from ...errors import BadFile, BadOption, OnDeviceError
from ...runtime.engine import require_known
from ...runtime.session import Session

ROWS = 32  # texts sampled side by side
SHORTEST = 64  # tokens of a text that the model writes, however little time it has
MARK = "\ue000"  # stands where a message begins


@dataclass(frozen=True)
class Sampling:
    """How far the model has come with writing its own text, in tokens."""

    done: int
    total: int


def samples(
    session: Session, source: Path | None, tokens: int, length: int, seed: int = 0,
    enough: Callable[[], bool] = lambda: False,
) -> Iterator[Sampling | np.ndarray]:  # fmt: skip
    """Ends with ids [N, length] int32, N * length at most `tokens` rounded up to whole windows.

    source: a text; a .jsonl of conversations ({"messages": [...]}, through the chat template) or of texts
    ({"text": ...}); None: what the model itself says, drawn with `seed`. Windows are spread evenly over a longer one.
    enough: asked while the model writes; once true, it ends there, with fewer windows or shorter ones.
    Raises BadOption where there is less than one window, BadFile for what cannot be read.
    """
    length = min(length, session.config.context)
    if length < 2:
        raise BadOption(f"A calibration window of {length} tokens shows nothing.", "Give 2 tokens or more.")
    if source is None:
        yield from _sampled(session, -(-tokens // length), length, seed, enough)
        return
    yield spread(windows(session, source, length), tokens)


def windows(session: Session, source: Path, length: int) -> np.ndarray:
    """All of a text or .jsonl of conversations, side by side: ids [N, length] int32. Raises as `samples` does."""
    ids = _conversations(session, source) if source.suffix == ".jsonl" else _text(session, source)
    require_known(ids, session.config.vocab, str(source))
    held = len(ids) // length
    if not held:
        raise BadOption(
            f"{source} has {len(ids)} tokens, less than one calibration window of {length}.", "Give a longer text."
        )
    return np.asarray(ids[: held * length], np.int32).reshape(held, length)


def spread(ids: np.ndarray, tokens: int) -> np.ndarray:
    """As many of these windows [N, length] as hold so many tokens, evenly spread."""
    wanted = min(len(ids), -(-tokens // ids.shape[1]))
    return ids[np.linspace(0, len(ids) - 1, wanted).round().astype(int)]


def read_text(source: Path) -> str:
    """Raises BadFile for what is no UTF-8 text or cannot be read."""
    try:
        return source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadFile(f"{source} is not UTF-8 text.", "Convert it first: iconv -t utf-8.") from None
    except OSError as error:
        raise BadFile(f"{source} cannot be read: {error.strerror}.", "Check the path and its rights.") from None


def _text(session: Session, source: Path) -> list[int]:
    return list(session.tokenizer.encode(read_text(source)))


def _conversations(session: Session, source: Path) -> list[int]:
    """All conversations end to end."""
    ids: list[int] = []
    for number, line in enumerate(read_text(source).splitlines(), 1):
        if line.strip():
            ids += _conversation(session, _parsed(source, number, line), f"{source}, line {number}")
    return ids


def _parsed(source: Path, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise BadFile(f"{source}, line {number}: this is not JSON.", "Give one JSON object a line.") from None


def _conversation(session: Session, record: object, where: str) -> list[int]:
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return list(session.tokenizer.encode(record["text"]))
    messages = record.get("messages") if isinstance(record, dict) else None
    plain = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages)
    if not plain or not messages:
        raise BadFile(f"{where}: there is neither a text nor messages.", 'Give {"messages": [{"role": …}, …]} a line.')
    return session.encode_messages(messages, add_generation_prompt=False)


# ------------------------------------------------------------------------------------------- the model's own text


def _sampled(
    session: Session, rows: int, length: int, seed: int, enough: Callable[[], bool]
) -> Iterator[Sampling | np.ndarray]:
    """Texts that the model writes from scratch: half as documents, half as conversations where it has a template."""
    starts = _starts(session)
    made: list[np.ndarray] = []
    for first in range(0, rows, ROWS):
        chosen = [starts[i % len(starts)] for i in range(first, min(first + ROWS, rows))]
        texts = yield from _written(session, chosen, length, seed, (first * length, rows * length), enough)
        made += [texts] if not made or texts.shape[1] == made[0].shape[1] else []
        if enough():
            break
    yield np.concatenate(made)


def _starts(session: Session) -> list[list[int]]:
    """How a text begins: the token that opens documents, and the template up to the first word of the user."""
    opening = session.tokenizer.encode("", add_special=True)
    if not opening:
        bos = session.tokenizer.bos_id
        opening = [min(session.stop_ids, default=0) if bos is None else bos]
    try:
        text = session.template.render([{"role": "user", "content": MARK}])
    except OnDeviceError:  # no template, or one that wants more than this: documents alone will do
        return [opening]
    chat = session.tokenizer.encode(text.partition(MARK)[0], add_special=False, parse_special=True)
    return [opening, chat] if chat else [opening]


def _written(
    session: Session, starts: Sequence[Sequence[int]], length: int, seed: int, told: tuple[int, int],
    enough: Callable[[], bool],
) -> Generator[Sampling, None, np.ndarray]:  # fmt: skip
    """Rows in step: one more token each at a time, given where the start has it, drawn where not; ids [rows, length],
    or fewer columns. told: tokens that there were before, and those that there will be in all."""
    decoder, rows = session.decoder, len(starts)
    ops, params = decoder.ops, [SamplingParams(temperature=1.0)] * rows
    cache, slots, ones = decoder.new_cache(rows, length), np.arange(rows, dtype=np.int32), np.ones(rows, np.int32)
    ids, name = np.zeros((rows, length), np.int32), f"calibration {told[0] // length}"
    given = np.zeros((rows, length), bool)
    for row, start in enumerate(starts):
        ids[row, : len(start)], given[row, : len(start)] = start[:length], True
    for at in range(length - 1):
        step = Step(np.full(rows, at, np.int32), ones, slots, cache=cache)
        logits = decoder(ops.array(ids[:, at : at + 1]), step, np.arange(rows, dtype=np.int32))
        cache.advance(slots, ones)
        drawn = ops.numpy(ops.sample(logits, params, noise.uniform(seed, name, at, (rows,))).ids)
        ids[:, at + 1] = np.where(given[:, at + 1], ids[:, at + 1], drawn)
        yield Sampling(told[0] + rows * (at + 2), told[1])
        if at + 2 >= SHORTEST and enough():
            return ids[:, : at + 2]
    return ids
