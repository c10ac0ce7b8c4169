"""What each token id stands for: its bytes, its kind, and how to show it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

# A token with one of these texts ends an answer or a turn, whatever the files declare: many name only one of several.
ENDS = frozenset({
    "<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>",
    "<|calls|>", "<|flush|>", "<end_of_turn>", "<turn|>", "<eos>", "</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "[e~[",
    "<end_of_utterance>", "<｜end▁of▁sentence｜>",
})  # fmt: skip
CHANNELS = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})  # where these are, <|end|> only ends a channel
SPACE = "▁"  # sentencepiece's mark for a space


class Kind(IntEnum):
    """What a token is, numbered as in sentencepiece's model files and in GGUF."""

    NORMAL = 1
    UNKNOWN = 2  # stands for what the vocabulary can't spell
    CONTROL = 3  # a special token: found in text only on request, hidden in answers
    USER_DEFINED = 4  # found in text whole, always; shown
    UNUSED = 5
    BYTE = 6  # <0x41>: one byte


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: the printable Latin-1 characters stand for themselves, the other
    bytes, in order, for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


@dataclass(frozen=True)
class Vocabulary:
    """texts[id]: a token as its file spells it ("" where an id has none). kinds[id]: what it is.

    byte_level: ordinary tokens are spelled in GPT-2's byte alphabet; else in UTF-8, with ▁ for a space.
    """

    texts: list[str]
    kinds: list[int]
    byte_level: bool

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def ids(self) -> dict[str, int]:
        """text -> id"""
        return dict(zip(self.texts, range(len(self.texts)), strict=True))

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids that an answer doesn't show."""
        return frozenset(id for id in self._whole if self.kinds[id] != Kind.USER_DEFINED)

    def matched(self) -> dict[str, int]:
        """The tokens that are looked for in text whole, in the order of their ids: text -> id."""
        return {self.texts[id]: id for id in self._whole if self.texts[id]}

    @cached_property
    def _whole(self) -> list[int]:
        kinds = {int(Kind.CONTROL), int(Kind.UNKNOWN), int(Kind.USER_DEFINED)}
        return [id for id, kind in enumerate(self.kinds) if kind in kinds]

    def ends(self) -> frozenset[int]:
        """The special tokens that, by their text, end an answer."""
        found = {self.texts[i]: i for i in self.special if self.texts[i] in ENDS}
        if any(channel <= found.keys() for channel in CHANNELS):
            found.pop("<|end|>", None)
        return frozenset(found.values())

    def bytes_of(self, id: int) -> bytes:
        """What a token adds to a text; nothing for an id that the vocabulary doesn't have."""
        if not 0 <= id < len(self.texts):
            return b""
        text, kind = self.texts[id], self.kinds[id]
        if kind == Kind.BYTE and is_byte(text):
            return bytes.fromhex(text[3:5])
        if kind in (Kind.CONTROL, Kind.UNKNOWN) or (self.byte_level and kind == Kind.USER_DEFINED):
            return text.encode()
        if not self.byte_level:
            return text.replace(SPACE, " ").encode()
        try:
            return bytes(map(BYTE_ALPHABET.__getitem__, text))
        except KeyError:  # a token outside the alphabet: llama.cpp and tokenizers take it literally, too
            return text.encode()

    def piece(self, id: int) -> str:
        r"""A token for people to read, on one line: what isn't printable is escaped (\n, \xe2)."""
        text = self.bytes_of(id).decode("utf-8", "backslashreplace")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_byte(text: str) -> bool:
    """Is a token spelled like a byte's, <0x41>?"""
    return len(text) == 6 and text.startswith("<0x") and text[5] == ">" and not set(text[3:5]) - set("0123456789ABCDEF")
