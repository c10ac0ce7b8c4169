"""Byte-level BPE of a first prompt, in Python: the library's own is far faster, but first indexes all merges of a
vocabulary, and a first token would wait for that."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise

from tokenizers.pre_tokenizers import PreTokenizer

from ...errors import BadFile
from .bpe import BpeEngine
from .vocabulary import Vocabulary

FIRST = 4000  # bytes of all texts; beyond them the library is worth its start, which takes ten times as long as they do
LONG_WORD = 256  # letters, likewise: here they take their square
NEVER = 1 << 62  # the rank of a pair that is no merge


class FirstTexts:
    """An engine that gives the library's ids, by itself for the first few texts. words: cuts text into words in GPT-2's
    byte alphabet. merges: "left right", the first to be done first. whole_words: a word that is a token is one,
    whatever the merges say. index: makes the library's engine, for all other texts."""

    def __init__(
        self, words: PreTokenizer, vocabulary: Vocabulary, merges: Sequence[str], whole_words: bool,
        index: Callable[[], BpeEngine],
    ):  # fmt: skip
        self._words, self._ids, self._special = words, vocabulary.ids, vocabulary.special
        self._ranks = dict(zip(merges, range(len(merges)), strict=True))
        self._whole_words, self._index = whole_words, index
        self._matched = vocabulary.matched()
        self._left = FIRST

    @cached_property
    def indexed(self) -> BpeEngine:
        return self._index()

    def encode(self, text: str, parse_special: bool) -> list[int]:
        self._left -= len(text.encode())
        ids = self._encoded(text, parse_special) if self._left >= 0 and "indexed" not in vars(self) else None
        return self.indexed.encode(text, parse_special) if ids is None else ids

    def encode_plain(self, text: str, start: bool) -> list[int]:
        return self.encode(text, parse_special=False)

    def partition(self, text: str) -> list[int | str]:
        return list(self._parts(text, self._special))

    @cached_property
    def _known(self) -> re.Pattern:
        """Tokens that are looked for in text whole; where two begin, the longer one is meant."""
        return re.compile("|".join(map(re.escape, sorted(self._matched, key=len, reverse=True))) or r"(?!)")

    def _parts(self, text: str, wanted: frozenset[int]) -> Iterator[int | str]:
        """The wanted ones of the tokens found whole, and the text between them."""
        done = 0
        for found in self._known.finditer(text):
            if self._matched[found[0]] in wanted:
                if found.start() > done:
                    yield text[done : found.start()]
                yield self._matched[found[0]]
                done = found.end()
        if done < len(text):
            yield text[done:]

    def _encoded(self, text: str, parse_special: bool) -> list[int] | None:
        """None where a word is long."""
        ids: list[int] = []
        matched = frozenset(self._matched.values())
        for part in self._parts(text, matched if parse_special else matched - self._special):
            if isinstance(part, int):
                ids.append(part)
                continue
            for word, _ in self._words.pre_tokenize_str(part):
                if len(word) >= LONG_WORD:
                    return None
                ids += self._word(word)
        return ids

    def _word(self, word: str) -> list[int]:
        if self._whole_words and word in self._ids:
            return [self._ids[word]]
        parts = self._merged([letter for letter in word if letter in self._ids])  # as the library: no token, no trace
        try:
            return [self._ids[part] for part in parts]
        except KeyError as error:
            raise BadFile(
                f"The GGUF's merges do not fit its tokens: they make {error.args[0]!r}.",
                "Download or convert the GGUF again.",
            ) from None

    def _merged(self, parts: list[str]) -> list[str]:
        ranks = [self._rank(*pair) for pair in pairwise(parts)]
        while ranks and (first := min(ranks)) < NEVER:
            at = ranks.index(first)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
            del ranks[at]
            for pair in range(max(at - 1, 0), min(at + 1, len(ranks))):
                ranks[pair] = self._rank(parts[pair], parts[pair + 1])
        return parts

    def _rank(self, left: str, right: str) -> int:
        return self._ranks.get(f"{left} {right}", NEVER)
