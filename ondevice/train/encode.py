"""One line of data -> ids and a mask: through the model's chat template, or plainly.

The mask of a conversation is derived, not guessed from markers: what the template shows before an answer (the prompt
that a program would send) is compared with what it shows with the answer in it; what is new is the answer. Templates
that show earlier turns differently later on (dropped thoughts, for example) are learnt turn by turn, each as the
model will see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BadFile, OnDeviceError, Unsupported
from ..registry import did_you_mean
from ..runtime.engine import common_prefix
from ..runtime.session import Session

ROLES = ("system", "developer", "user", "assistant", "tool")
KINDS = "messages; prompt and completion; text"


@dataclass(frozen=True)
class Encoded:
    """ids int32 [n]; learnt bool [n]: the ids that the model must come to say."""

    ids: np.ndarray
    learnt: np.ndarray

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def learns(self) -> bool:
        """Whether anything is left to learn: the first id never is, nothing comes before it."""
        return bool(self.learnt[1:].any())

    def cut(self, most: int) -> Encoded:
        return self if self.length <= most else Encoded(self.ids[:most], self.learnt[:most])


def encoded(ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> Encoded:
    learnt = np.zeros(len(ids), bool)
    for start, end in spans:
        learnt[start:end] = True
    return Encoded(np.array(ids, np.int32), learnt)


def example(session: Session, line: Mapping[str, Any], max_length: int) -> list[Encoded]:
    """A line as sequences. Raises BadFile for what is wrong with it, without its place."""
    if "messages" in line:
        return conversation(session, _messages(line["messages"], "messages"), line.get("tools"))
    if "prompt" in line and "completion" in line:
        return [completion(session, line["prompt"], line["completion"], "completion", line.get("tools"))]
    if "text" in line:
        return text(session, _text(line["text"], "text"), max_length)
    if "chosen" in line:
        raise BadFile("this is a preference, and the objective is next-token.", "Give --objective dpo or orpo.")
    raise BadFile(f"this has only the fields {', '.join(map(repr, line)) or '(none)'}.", f"Known kinds: {KINDS}.")


def preference(session: Session, line: Mapping[str, Any]) -> tuple[Encoded, Encoded]:
    """A line of prompt, chosen, rejected as two sequences; without a prompt, chosen and rejected are conversations."""
    missing = [name for name in ("chosen", "rejected") if name not in line]
    if missing:
        raise BadFile(f"this has no {' and no '.join(map(repr, missing))}.", "A preference has chosen and rejected.")
    made = []
    for name in ("chosen", "rejected"):
        prompt, answer = line.get("prompt"), line[name]
        if prompt is None:
            messages = _messages(answer, name)
            if messages[-1]["role"] != "assistant":
                raise BadFile(f"{name!r} does not end with the assistant.", "Its last message must be the answer.")
            prompt, answer = messages[:-1], messages[-1:]
        made.append(completion(session, prompt, answer, name, line.get("tools")))
    return made[0], made[1]


def completion(session: Session, prompt: Any, answer: Any, name: str, tools: Any = None) -> Encoded:
    """Text behind a text, as `generate` would see it; or messages behind messages, as chat would."""
    if isinstance(prompt, list):
        before = _messages(prompt, "prompt")
        after = _messages(answer, name) if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
        ids, start = _turn(session, before, _messages(after, name), tools)
        return encoded(ids, [(start, _stop(session, ids, start))])
    tokenizer = session.tokenizer
    head = tokenizer.encode(_text(prompt, "prompt"), add_special=True, parse_special=True)
    head = head[: len(head) - len(tokenizer.suffix)]
    ids = [*head, *tokenizer.encode_plain(_text(answer, name), start=not head), *_end(session)]
    return encoded(ids, [(len(head), len(ids))])


def text(session: Session, value: str, max_length: int) -> list[Encoded]:
    """Plain text, all of it learnt; a long one in several pieces, so that nothing is lost."""
    tokenizer = session.tokenizer
    ids = tokenizer.encode(value, add_special=True, parse_special=True)
    ids += [] if tokenizer.suffix else _end(session)
    pieces = [ids[at : at + max_length] for at in range(0, len(ids), max_length)]
    return [encoded(piece, [(0, len(piece))]) for piece in pieces if len(piece) > 1]


def conversation(session: Session, messages: Sequence[Mapping], tools: Any = None) -> list[Encoded]:
    """All answers of a conversation in one sequence where the template lets them stand as they are, else each answer
    behind what the model will see when it has to give it."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not answers:
        raise BadFile("no message is the assistant's: there is nothing to learn.", "Add an answer.")
    ends = [i for i in answers if i + 1 == len(messages) or messages[i + 1]["role"] != "assistant"]
    turns = [_turn(session, *_apart(messages, i), tools) for i in ends]
    spans = [(start, _stop(session, ids, start)) for ids, start in turns]
    whole = turns[-1][0]
    if all(whole[: len(ids)] == ids for ids, _ in turns):
        return [encoded(whole, spans)]
    return [encoded(ids, [span]) for (ids, _), span in zip(turns, spans, strict=True)]


def _apart(messages: Sequence[Mapping], last: int) -> tuple[Sequence[Mapping], Sequence[Mapping]]:
    """What comes before the run of the assistant's messages that ends at `last`, and that run."""
    first = last
    while first and messages[first - 1]["role"] == "assistant":
        first -= 1
    return messages[:first], messages[first : last + 1]


def _turn(session: Session, before: Sequence[Mapping], answer: Sequence[Mapping], tools: Any) -> tuple[list[int], int]:
    """The ids of an answer behind its prompt, and where the answer begins."""
    whole = _ids(session, [*before, *answer], tools, False)
    _require_shown(session, [*before, *answer], tools, whole)
    if not before:
        return whole, 0
    prompt = _ids(session, before, tools, True)
    start = common_prefix(whole, prompt)
    # A prompt may end in what an answer in the past does not show (an opened thought): that is not learnt.
    if start < len(prompt) and start < len(_ids(session, before, tools, False)):
        raise Unsupported(
            "the chat template shows this conversation differently once it is answered: no telling what is learnt.",
            "Give it as prompt and completion.",
        )
    if start >= len(whole):
        raise BadFile("the chat template shows nothing of an answer.", "Give the answer a content.")
    return whole, start


def _require_shown(session: Session, messages: Sequence[Mapping], tools: Any, whole: list[int]) -> None:
    """Raises Unsupported where the template passes tools or calls over in silence: an empty answer would be learnt."""
    hint = "Take a model that was made for tools, or write them out in the messages' contents."
    if tools and _ids(session, messages, None, False) == whole:
        raise Unsupported("this model's chat template does not show tools.", hint)
    if any(m.get("tool_calls") for m in messages) and _mute(session, messages, tools) == whole:
        raise Unsupported("this model's chat template does not show tool calls.", hint)


def _mute(session: Session, messages: Sequence[Mapping], tools: Any) -> list[int] | None:
    """The ids without any call; None from a template that demands them, and so shows them."""
    try:
        return _ids(session, [{k: v for k, v in m.items() if k != "tool_calls"} for m in messages], tools, False)
    except OnDeviceError:
        return None


def _ids(session: Session, messages: Sequence[Mapping], tools: Any, prompt: bool) -> list[int]:
    return session.encode_messages(messages, tools=tools, add_generation_prompt=prompt)


def _stop(session: Session, ids: Sequence[int], start: int) -> int:
    """Where an answer ends: behind its last stop token; what the template puts there is not the model's to say."""
    stops = [i + 1 for i in range(start, len(ids)) if ids[i] in session.stop_ids]
    return stops[-1] if stops else len(ids)


def _end(session: Session) -> list[int]:
    """The token that ends a text."""
    tokenizer = session.tokenizer
    found = tokenizer.named_ids.get("eos")
    return [found] if found is not None else sorted(tokenizer.eos_ids)[:1]


# ---------------------------------------------------------------------------------------------- checking a line


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadFile(f"{name!r} is no text.", "Give a string.")
    if not value:
        raise BadFile(f"{name!r} is empty.", "Fill or remove this line.")
    return value


def _messages(value: Any, name: str) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise BadFile(f"{name!r} is no list of messages.", 'Give [{"role": "user", "content": "…"}, …].')
    return [_message(m, i) for i, m in enumerate(value, 1)]


def _message(message: Any, number: int) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadFile(f"message {number} has no role.", f"Roles: {', '.join(ROLES)}.")
    if message["role"] not in ROLES:
        raise BadFile(
            f"message {number} has the unknown role {message['role']!r}.", did_you_mean(message["role"], ROLES)
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    if not isinstance(content, str | list) or (not content and not message.get("tool_calls")):
        raise BadFile(f"message {number} has no content.", "Give a text.")
    return message
