"""The tokenizer that the rest of the program sees, whatever file it came from."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from ...errors import BadOption
from .vocabulary import Vocabulary


class Engine(Protocol):
    """How one library cuts text into tokens. Nothing is added at the ends."""

    def encode(self, text: str, parse_special: bool) -> list[int]: ...

    def partition(self, text: str) -> list[int | str]:
        """Special tokens as ids, and the text between them."""
        ...

    def encode_plain(self, text: str, start: bool) -> list[int]:
        """Text in which special tokens count for nothing. start: it begins the whole text, so that a space which the
        tokenizer puts in front of a text belongs there."""
        ...


@dataclass
class Tokenizer:
    """Text <-> ids. Safe to use from several threads.

    prefix, suffix: ids that `encode` adds around a text. named_ids: by role: bos, eos, unk, pad. eos_ids: every token
    that ends an answer or a turn. drops_space: decoding takes one space off the beginning, which encoding had put
    there. chat_template: jinja source. write: of `files`; it is handed the tokenizer, which so does not hold itself and
    goes as soon as nobody needs it.
    """

    engine: Engine = field(repr=False)
    vocabulary: Vocabulary = field(repr=False)
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    named_ids: Mapping[str, int] = field(default_factory=dict)
    eos_ids: frozenset[int] = frozenset()
    drops_space: bool = False
    chat_template: str | None = field(default=None, repr=False)
    write: Callable[[Tokenizer], dict[str, bytes]] = field(default=lambda _: {}, repr=False)

    def files(self) -> dict[str, bytes]:
        """Name -> content of the files of a Hugging Face folder with which transformers gives the same ids."""
        return self.write(self)

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` and `stream` leave out unless told otherwise."""
        return self.vocabulary.special

    @property
    def bos_id(self) -> int | None:
        return self.named_ids.get("bos")

    @property
    def bos_token(self) -> str:
        """As the vocabulary spells it; "" where there is none."""
        return self.named("bos")

    @property
    def eos_token(self) -> str:
        return self.named("eos")

    def named(self, role: str) -> str:
        """The text of the token with a role (bos, eos, unk, pad); "" where there is none."""
        return self.vocabulary.texts[self.named_ids[role]] if role in self.named_ids else ""

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """How they are written."""
        return frozenset(self.vocabulary.texts[id] for id in self.special_ids)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """add_special: with the ids that the tokenizer itself puts around a text. parse_special: special tokens' text
        becomes their ids; False: it stays ordinary text. Raises BadOption for text that is no Unicode text."""
        ids = self.engine.encode(_checked(text), parse_special)
        return [*self.prefix, *ids, *self.suffix] if add_special else ids

    def partition(self, text: str) -> list[int | str]:
        """Special tokens as ids, and the text between them."""
        return self.engine.partition(_checked(text))

    def encode_plain(self, text: str, start: bool) -> list[int]:
        """A part between special tokens, in which their texts count for nothing. start: nothing comes before it."""
        return self.engine.encode_plain(_checked(text), start)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """What isn't UTF-8 becomes U+FFFD."""
        hidden = self.special_ids if skip_special else ()
        text = b"".join(self.bytes_of(id) for id in ids if id not in hidden).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.drops_space else text

    def stream(self, skip_special: bool = True) -> Stream:
        """Ids one by one -> text as it becomes certain."""
        return Stream(self, skip_special)

    def bytes_of(self, id: int) -> bytes:
        """What a token adds to a text; nothing for an id that the vocabulary doesn't have."""
        return self.vocabulary.bytes_of(id)

    def piece(self, id: int) -> str:
        """A token for people to read, on one line."""
        return self.vocabulary.piece(id)


class Stream:
    """Holds back the bytes of a character that isn't complete; joined, its pieces are what `decode` gives."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._bytes_of = tokenizer.bytes_of
        self._hidden = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = tokenizer.drops_space

    def push(self, id: int) -> str:
        """The text that is certain now; often empty."""
        return "" if id in self._hidden else self._shown(self._decoder.decode(self._bytes_of(id)))

    def flush(self) -> str:
        """The rest: U+FFFD where the last character never became complete."""
        return self._shown(self._decoder.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        if text and self._drops_space:
            self._drops_space = False
            return text.removeprefix(" ")
        return text


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadOption(
            f"The text is not Unicode: character {error.start} is half of a pair or a stray byte.",
            "Give it as UTF-8.",
        ) from None
    return text
