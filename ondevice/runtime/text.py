"""Tokens into text: whole characters only, and nothing of a stop string is ever shown."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .engine import Finished, Prefilled, Token
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """A token and the text that can be shown since the last piece (may be empty)."""

    text: str
    token: Token


@dataclass
class TextFinished:
    """The answer as a whole. text: without stop token and stop string. reason: stop, length or context."""

    text: str
    token_ids: list[int]
    reason: str
    prompt_tokens: int
    reused_tokens: int
    prefill_seconds: float  # the prompt's new tokens through the model
    first_token_seconds: float  # from the request to the first token
    decode_seconds: float  # from the first token to the last
    last_text: str = ""  # what no piece has shown yet

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, over the time between first and last."""
        steps = len(self.token_ids) - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else 0.0


@dataclass
class _Stopper:
    """Holds text back while it may be the beginning of a stop string."""

    stops: Sequence[str]
    held: str = ""
    shown: list[str] = field(default_factory=list)
    stopped: bool = False

    def push(self, text: str) -> str:
        self.held += text
        cut = min((at for s in self.stops if (at := self.held.find(s)) >= 0), default=None)
        if cut is not None:
            self.stopped = True
            ready, self.held = self.held[:cut], ""
        else:
            keep = max((_overlap(self.held, s) for s in self.stops), default=0)
            ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.shown.append(ready)
        return ready

    def flush(self) -> str:
        ready, self.held = self.held, ""
        self.shown.append(ready)
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(
    events: Iterable[Prefilled | Token | Finished],
    tokenizer: Tokenizer,
    stop_ids: frozenset[int],
    stop: Sequence[str] = (),
) -> Iterator[Piece | TextFinished]:
    """The engine's events as text. Ends with one TextFinished; closing it early closes the engine's generator."""
    decoder, stopper = tokenizer.stream(), _Stopper([s for s in stop if s])
    ids: list[int] = []
    reason, asked, first = "stop", time.perf_counter(), 0.0
    for event in events:
        if isinstance(event, Prefilled):
            prefilled = event
        elif isinstance(event, Finished):
            reason = event.reason
        else:
            latest = time.perf_counter()
            first = first or latest
            ids.append(event.id)
            yield Piece(stopper.push("" if event.id in stop_ids else decoder.push(event.id)), event)
            if stopper.stopped:
                break
    unshown = "" if stopper.stopped else stopper.push(decoder.flush()) + stopper.flush()
    yield TextFinished(
        text="".join(stopper.shown),
        token_ids=ids,
        reason="stop" if stopper.stopped else reason,
        prompt_tokens=prefilled.tokens,
        reused_tokens=prefilled.reused,
        prefill_seconds=prefilled.seconds,
        first_token_seconds=first - asked,
        decode_seconds=latest - first,
        last_text=unshown,
    )
