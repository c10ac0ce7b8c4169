"""The scripted decoder beneath the real engine: what is said, and what went through the model for it."""

from __future__ import annotations

import numpy as np

from ondevice.backends.base import SamplingParams
from ondevice.runtime.engine import Engine, Finished, GenerateOptions, Prefilled, Token
from ondevice.testing.scripted import ScriptedDecoder


def ids_of(events) -> list[int]:
    return [event.id for event in events if isinstance(event, Token)]


def test_it_says_its_line() -> None:
    decoder = ScriptedDecoder.saying(3, [7, 8, 9, 2])
    events = list(Engine(decoder, 32).generate([1, 5, 6], GenerateOptions(stop_ids=frozenset({2}))))
    assert ids_of(events) == [7, 8, 9, 2]
    assert isinstance(events[-1], Finished) and events[-1].reason == "stop"


def test_it_shows_what_was_reused() -> None:
    """The next turn begins with what the cache holds: only the new ids go through."""
    decoder = ScriptedDecoder(lambda ids: 7 if len(ids) < 5 else 2)
    engine = Engine(decoder, 32)
    first = ids_of(engine.generate([1, 5, 6], GenerateOptions(stop_ids=frozenset({2}))))
    decoder.passes.clear()
    events = list(engine.generate([1, 5, 6, *first, 11, 12], GenerateOptions(stop_ids=frozenset({2}))))
    prefilled = events[0]
    assert isinstance(prefilled, Prefilled) and prefilled.reused == 5
    assert decoder.passes[0] == [2, 11, 12]
    assert decoder.held[0] == [1, 5, 6, 7, 7, 2, 11, 12]


def test_it_may_give_logits() -> None:
    decoder = ScriptedDecoder(lambda ids: np.log(np.arange(1, 5, dtype=np.float32)), vocab=4)
    options = GenerateOptions(max_tokens=200, sampling=SamplingParams(temperature=1.0), seed=3)
    ids = ids_of(Engine(decoder, 256).generate([0], options))
    shares = np.bincount(ids, minlength=4) / 200
    assert np.abs(shares - np.arange(1, 5) / 10).max() < 0.1
