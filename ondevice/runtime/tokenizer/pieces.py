"""The sentencepiece library as an engine: tokenizer.model files, and their kind out of GGUF."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from . import proto
from .vocabulary import SPACE

SPACES = (" ", SPACE)


@dataclass(frozen=True)
class Match:
    """A token that is looked for in text whole. special: only on request. lstrip, rstrip: it swallows the whitespace
    on that side."""

    text: str
    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False


class PieceEngine:
    """Text is first cut at the tokens that are looked for whole, the longest ones first (as llama.cpp does); what lies
    between is sentencepiece's.

    prefix: where a space is put in front: "never", in front of the "first" part if that is text, or "always", after
    each token found whole too. doubles: also in front of a part that begins with a space.
    """

    def __init__(self, model: bytes, matches: Iterable[Match], prefix: str, doubles: bool):
        """Raises RuntimeError where sentencepiece refuses the model."""
        from sentencepiece import SentencePieceProcessor  # some milliseconds that byte-level models need not wait for

        self._processor = SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(proto.without_dummy_prefix(model))
        self._matches = sorted(matches, key=lambda match: -len(match.text.encode()))
        self._prefix, self._doubles = prefix, doubles

    def encode(self, text: str, parse_special: bool) -> list[int]:
        return self._encode(text, self._prefix != "never", parse_special)

    def encode_plain(self, text: str, start: bool) -> list[int]:
        return self._encode(text, self._prefix == "always" or (start and self._prefix == "first"), False)

    def partition(self, text: str) -> list[int | str]:
        return _cut(text, [match for match in self._matches if match.special])

    def _encode(self, text: str, spaced: bool, parse_special: bool) -> list[int]:
        """spaced: the first part gets a space in front."""
        ids: list[int] = []
        for part in _cut(text, [match for match in self._matches if parse_special or not match.special]):
            if isinstance(part, int):
                ids.append(part)
            else:
                space = " " if spaced and (self._doubles or part[0] not in SPACES) else ""
                ids += self._processor.EncodeAsIds(space + part)
            spaced = isinstance(part, int) and self._prefix == "always"
        return ids


def _cut(text: str, matches: Iterable[Match]) -> list[int | str]:
    """Tokens found whole as ids, and the text between them, none of it empty."""
    parts: list[int | str] = [text] if text else []
    for match in matches:
        if match.text in text:
            parts = [new for part in parts for new in (_cut_at(part, match) if isinstance(part, str) else [part])]
    return parts


def _cut_at(text: str, match: Match) -> list[int | str]:
    found = text.split(match.text)
    parts: list[int | str] = []
    for i, between in enumerate(found):
        if i > 0:
            parts.append(match.id)
            between = between.lstrip() if match.rstrip else between
        if i < len(found) - 1 and match.lstrip:
            between = between.rstrip()
        if between:
            parts.append(between)
    return parts
