"""Text into token ids and back, whatever the tokenizer came as: tokenizer.json, tokenizer.model, or inside a GGUF.

Two engines do the cutting, both libraries: `tokenizers` (byte-level BPE and all else in a tokenizer.json) and
`sentencepiece`. Decoding is ours: every token is a string of bytes, so text can be streamed without ever showing half a
character, and the streamed pieces add up to what `decode` gives.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Cutter(Protocol):
    """What a kind of tokenizer must know. Ids are ints below `size`."""

    size: int
    strip_first_space: bool  # the first piece of a text lost a space that encoding had put there

    def ids(self, text: str, add_special: bool, parse_special: bool) -> list[int]: ...

    def bytes_of(self, id: int) -> bytes: ...

    def id_of(self, piece: str) -> int | None: ...


@dataclass(frozen=True)
class Facts:
    """What a tokenizer's files say besides how to cut."""

    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    special_ids: frozenset[int] = frozenset()
    chat_template: str | None = None
    bos_token: str = ""
    eos_token: str = ""


class Tokenizer:
    """Text to ids and back.

    bos_id: the beginning-of-text token or None. eos_ids: every token that ends an answer or a turn. special_ids: control
    tokens, which `decode` leaves out unless told otherwise.
    """

    def __init__(self, cutter: Cutter, facts: Facts, files: Mapping[str, bytes]):
        self._cutter, self._files = cutter, files
        self.vocab_size = cutter.size
        self.bos_id, self.eos_ids, self.special_ids = facts.bos_id, facts.eos_ids, facts.special_ids
        self.bos_token, self.eos_token = facts.bos_token, facts.eos_token
        self.chat_template = facts.chat_template

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """add_special: with the tokens the tokenizer itself puts around a text (BOS, …). parse_special: a special token
        written out in the text becomes that token; otherwise it stays text."""
        return self._cutter.ids(text, add_special, parse_special)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        stream = self.stream(skip_special)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, skip_special: bool = True) -> TokenStream:
        return TokenStream(self, skip_special)

    def bytes_of(self, id: int) -> bytes:
        """What a token stands for. Empty for ids beyond the vocabulary (models pad theirs)."""
        if not 0 <= id < self.vocab_size:
            return b""
        return self._cutter.bytes_of(id)

    def piece(self, id: int) -> str:
        """A token as something printable: bytes that are no character are shown as <0xE2>."""
        return self.bytes_of(id).decode("utf-8", "replace") if _whole(self.bytes_of(id)) else _hex(self.bytes_of(id))

    def id_of(self, piece: str) -> int | None:
        """The id of a special or ordinary token by its written form; None when there is none."""
        return self._cutter.id_of(piece)

    def files(self) -> dict[str, bytes]:
        """The side files that make a Hugging Face folder with this tokenizer."""
        return dict(self._files)

    @property
    def strip_first_space(self) -> bool:
        return self._cutter.strip_first_space


class TokenStream:
    """Ids in, text out, whole characters only; the pieces add up to `decode` of all the ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = tokenizer.strip_first_space

    def push(self, id: int) -> str:
        if id in self._skip:
            return ""
        data = self._tokenizer.bytes_of(id)
        if self._first and data:
            self._first, data = False, data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left: an unfinished character, shown as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(source: str | Path | Mapping) -> Tokenizer:
    """From a Hugging Face folder, or from a GGUF's metadata. Raises BadFile when there is none or it is damaged."""
    if isinstance(source, Mapping):
        from .gguf import from_gguf

        return from_gguf(source)
    from .folder import from_folder

    return from_folder(Path(source))


def _whole(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _hex(data: bytes) -> str:
    return "".join(f"<0x{b:02X}>" for b in data)
