"""The two libraries that cut text, behind one face (`Cutter`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property

import sentencepiece
import tokenizers

from ...errors import Unsupported


class FastCutter:
    """The `tokenizers` library: whatever a tokenizer.json says."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self.added = tokenizer.get_added_tokens_decoder()
        self.size = max([tokenizer.get_vocab_size(), *(id + 1 for id in self.added)])
        kinds = _decoder_kinds(tokenizer)
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and not {"ByteFallback", "Metaspace", "Replace"} & kinds:
            known = ", ".join(sorted(kinds)) or "none"
            raise Unsupported(f"The tokenizer decodes with {known}, which is not known here.", "Use another model.")
        self.strip_first_space = bool({"Strip", "Metaspace"} & kinds)

    def ids(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not parse_special
        return self._tokenizer.encode(text, add_special_tokens=add_special).ids

    def bytes_of(self, id: int) -> bytes:
        if id in self.added:
            return self.added[id].content.encode()
        piece = self._tokenizer.id_to_token(id)
        if piece is None:
            return b""
        return _from_byte_letters(piece) if self._byte_level else _from_metaspace(piece)

    def id_of(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)


def _decoder_kinds(tokenizer: tokenizers.Tokenizer) -> set[str]:
    """The types of the decoder's steps."""
    if tokenizer.decoder is None:
        return set()
    decoder = json.loads(tokenizer.decoder.__getstate__())
    return {step["type"] for step in decoder.get("decoders", [decoder])}


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: the letter that stands for each byte in a byte-level vocabulary, turned round."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_LETTERS = _byte_letters()


def _from_byte_letters(piece: str) -> bytes:
    try:
        return bytes(BYTE_LETTERS[c] for c in piece)
    except KeyError:  # not in the alphabet: a token somebody added as plain text
        return piece.encode()


def _from_metaspace(piece: str) -> bytes:
    """sentencepiece's spelling: ▁ is a space, <0xE2> is a byte."""
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


class PieceCutter:
    """The `sentencepiece` library. `added`: tokens found in the text as they are written, before it is cut; `special`
    among them are not looked for when the text's special tokens are to stay text. `before`, `after`: what the tokenizer
    puts around a text."""

    def __init__(
        self,
        model: bytes,
        added: Mapping[str, int],
        special: frozenset[int],
        before: tuple[int, ...] = (),
        after: tuple[int, ...] = (),
        adds_space: bool = True,
    ):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._added, self._special = dict(added), special
        self._texts = {id: text for text, id in self._added.items()}
        self._before, self._after = list(before), list(after)
        self.size = max([self._processor.vocab_size(), *(id + 1 for id in self._texts)])
        self.strip_first_space = adds_space

    @cached_property
    def _patterns(self) -> dict[bool, re.Pattern | None]:
        """By whether special tokens are parsed: what finds the added tokens, the longest first."""
        ordinary = [t for t, id in self._added.items() if id not in self._special]
        return {True: _any_of(self._added), False: _any_of(ordinary)}

    def ids(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        pattern = self._patterns[parse_special]
        ids: list[int] = []
        for part in pattern.split(text) if pattern else [text]:
            known = self._added.get(part) if pattern and pattern.fullmatch(part) else None
            ids += self._processor.encode(part) if known is None else [known]
        return self._before + ids + self._after if add_special else ids

    def bytes_of(self, id: int) -> bytes:
        if id in self._special:
            return self._texts.get(id, "").encode()
        if id >= self._processor.vocab_size():
            return self._texts.get(id, "").encode()
        return _from_metaspace(self._processor.id_to_piece(id))

    def id_of(self, piece: str) -> int | None:
        if piece in self._added:
            return self._added[piece]
        id = self._processor.piece_to_id(piece)
        return None if id == self._processor.unk_id() else id


def _any_of(texts) -> re.Pattern | None:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
