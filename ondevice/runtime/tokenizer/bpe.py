"""The `tokenizers` library as an engine: tokenizer.json files, and byte-level BPE out of GGUF."""

from __future__ import annotations

import threading

from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import Metaspace, Sequence


class BpeEngine:
    """Any tokenizer of the library, without what its post-processor adds."""

    def __init__(self, backend: Backend):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._special = {i: t.content for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self._metaspace = _metaspace(backend)
        self._lock = threading.Lock()  # what to parse and to prefix are settings of the library's object

    def encode(self, text: str, parse_special: bool) -> list[int]:
        with self._lock:
            self.backend.encode_special_tokens = not parse_special
            return self.backend.encode(text, add_special_tokens=False).ids

    def partition(self, text: str) -> list[int | str]:
        with self._lock:
            self.backend.encode_special_tokens = False
            found = self.backend.encode(text, add_special_tokens=False)
        parts: list[int | str] = []
        done = 0
        for id, (start, end) in zip(found.ids, found.offsets, strict=True):
            if id in self._special and self._special[id] in text[start:end]:  # not an unknown token for other text
                parts += [text[done:start], id]
                done = end
        return [part for part in [*parts, text[done:]] if part != ""]

    def encode_plain(self, text: str, start: bool) -> list[int]:
        if start or self._metaspace is None or self._metaspace.prepend_scheme != "first":
            return self.encode(text, parse_special=False)
        with self._lock:
            self._metaspace.prepend_scheme = "never"
            try:
                self.backend.encode_special_tokens = True
                return self.backend.encode(text, add_special_tokens=False).ids
            finally:
                self._metaspace.prepend_scheme = "first"

    def added(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the post-processor puts before and after a text."""
        self.backend.encode_special_tokens = False
        bare = self.backend.encode("a", add_special_tokens=False).ids
        full = self.backend.encode("a", add_special_tokens=True).ids
        for before in range(len(full) - len(bare) + 1):
            if full[before : before + len(bare)] == bare:
                return tuple(full[:before]), tuple(full[before + len(bare) :])
        return (), ()


def _metaspace(backend: Backend) -> Metaspace | None:
    """The step that puts a space in front of a text, if there is one."""
    step = backend.pre_tokenizer
    steps = step if isinstance(step, Sequence) else [step]
    return next((s for s in steps if isinstance(s, Metaspace)), None)
