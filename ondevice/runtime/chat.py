"""A conversation: what was said, how much of it the model still sees, and how it goes on. Events out; nothing prints.

The context policy: a new message and a reserve for its answer (max_tokens, at most a quarter of the context) must fit.
Where they don't, the oldest exchanges are hidden from the model, until twice the reserve is free, so that the next
turns need not begin anew; the system prompt stays. A message that cannot fit even so is refused and changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..checkpoint.files import damaged, read_object
from ..checkpoint.write import write_file
from ..errors import BadOption, ContextFull
from .engine import GenerateOptions
from .session import Session
from .text import Piece, TextFinished

LARGEST_FILE = 64 << 20  # bytes of a saved conversation


@dataclass(frozen=True)
class Hidden:
    """The context is full: the model no longer sees so many of the oldest exchanges."""

    exchanges: int


@dataclass
class Exchange:
    """A message and its answer. prompt_ids: all that the model was given; answer_ids: exactly what it said, without the
    stop token; both empty when the exchange comes from a file. reason: as in TextFinished, or interrupted."""

    user: str
    answer: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)
    reason: str = "interrupted"

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.user}, {"role": "assistant", "content": self.answer}]


class Conversation:
    """Messages in, answers out, on a session's engine. Everything public may be changed between two messages.

    `hidden` counts the exchanges, from the oldest, that the model no longer sees. Raises Unsupported when the model has
    no chat template.
    """

    def __init__(self, session: Session, options: GenerateOptions, stop: Sequence[str] = (), system: str | None = None):
        self.session, self.options, self.stop, self.system = session, options, stop, system
        self.exchanges: list[Exchange] = []
        self.hidden = 0
        self.last: TextFinished | None = None
        self._attempt = 0
        _ = session.template  # asked now, not behind the first message

    def send(self, text: str) -> Iterator[Hidden | Piece | TextFinished]:
        """The answer to a message, as events. When the generator is closed or interrupted, what came of the answer is
        kept; before its first token, nothing has happened. Raises ContextFull."""
        self._attempt = 0
        yield from self._answer(text)

    def retry(self) -> Iterator[Hidden | Piece | TextFinished]:
        """Another answer to the last message, in the old one's place; with another seed, in a fixed order."""
        if not self.exchanges:
            raise BadOption("There is no message to answer again.", "Say something first.")
        count, last = len(self.exchanges), self.exchanges[-1]
        self._attempt += 1
        try:
            del self.exchanges[-1]
            yield from self._answer(last.user)
        finally:
            if len(self.exchanges) < count:  # nothing came
                self.exchanges.append(last)

    def clear(self) -> None:
        """Back to the beginning; the system prompt stays."""
        self.exchanges, self.hidden, self.last = [], 0, None

    def _answer(self, text: str) -> Iterator[Hidden | Piece | TextFinished]:
        hidden, prompt = self._fit(text)
        if hidden > self.hidden:
            yield Hidden(hidden - self.hidden)
        said, options = Exchange(text, prompt_ids=prompt), self.options
        options = replace(options, seed=options.seed + self._attempt)
        try:
            with closing(self.session.generate(prompt, options, self.stop)) as events:
                for event in events:
                    self._note(said, event)
                    yield event
        finally:
            if said.answer_ids or said.reason != "interrupted":
                self.exchanges.append(said)
                self.hidden = hidden

    def _note(self, said: Exchange, event: Piece | TextFinished) -> None:
        if isinstance(event, Piece):
            said.answer += event.text
            said.answer_ids.append(event.token.id)
            return
        said.answer, said.reason, self.last = event.text, event.reason, event
        if said.answer_ids[-1] in self.session.stop_ids:
            said.answer_ids.pop()

    def _fit(self, text: str) -> tuple[int, list[int]]:
        """How many exchanges must be hidden for a message to fit, and the prompt's ids then."""
        capacity = self.session.capacity - len(self.session.decoder.front)
        reserve = min(self.options.max_tokens or capacity, max(capacity // 4, 1))
        free = reserve
        for hidden in range(self.hidden, len(self.exchanges) + 1):
            prompt = self._encode(self.exchanges[hidden:], text)
            if len(prompt) + free <= capacity:
                return hidden, prompt
            free = 2 * reserve
        if len(prompt) + reserve <= capacity:
            return hidden, prompt
        raise ContextFull(
            f"The message and what stands around it are {len(prompt)} tokens; the context holds {capacity}, "
            f"{reserve} of them kept for the answer.",
            "Shorten the message or the system prompt, or start again with a larger --context.",
        )

    def _encode(self, exchanges: Sequence[Exchange], text: str) -> list[int]:
        ids = self.session.encode_messages([*self._messages(exchanges), {"role": "user", "content": text}])
        for exchange in exchanges:
            ids = self._as_generated(ids, exchange)
        return ids

    def _messages(self, exchanges: Sequence[Exchange]) -> list[dict[str, str]]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + [message for exchange in exchanges for message in exchange.messages]

    def _as_generated(self, ids: list[int], exchange: Exchange) -> list[int]:
        """The same ids with an answer cut into tokens as the model cut it, which is not always how the tokenizer would:
        so the cache still holds them. Left alone where the template has changed anything up to the answer's end."""
        start = end = len(exchange.prompt_ids)
        if not exchange.answer_ids or ids[:start] != exchange.prompt_ids:
            return ids
        bytes_of = self.session.tokenizer.bytes_of
        wanted, found = b"".join(map(bytes_of, exchange.answer_ids)), b""
        while end < len(ids) and len(found) < len(wanted):
            found += bytes_of(ids[end])
            end += 1
        return ids[:start] + exchange.answer_ids + ids[end:] if found == wanted else ids

    # ---- files

    def save(self, path: Path) -> None:
        """As a JSON object with the whole conversation in `messages`; the file appears whole or not at all."""
        saved = {"model": str(self.session.path), "messages": self._messages(self.exchanges)}
        write_file(path, (json.dumps(saved, indent=1) + "\n").encode())

    def load(self, path: Path) -> None:
        """Go on with what was saved, in this one's place. Raises BadFile, and nothing has changed, for other files."""
        messages = read_object(path, LARGEST_FILE).get("messages")
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise damaged(path, "it is not a saved conversation", "Give a file that /save has written.")
        system = None
        if messages and messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        if [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2):
            raise damaged(path, "its messages do not take turns", "Give a file that /save has written.")
        pairs = zip(messages[::2], messages[1::2], strict=True)
        exchanges = [Exchange(user["content"], answer["content"], reason="stop") for user, answer in pairs]
        self.clear()
        self.system, self.exchanges = system, exchanges


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))
