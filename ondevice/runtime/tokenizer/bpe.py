"""The `tokenizers` library as an engine: tokenizer.json files, and byte-level BPE out of GGUF."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import Metaspace, Sequence

from ...errors import BadFile, OnDeviceError

HINT = "Fetch the model again, with its tokenizer files."


@contextmanager
def told(complain: Callable[[str], OnDeviceError]) -> Iterator[None]:
    """Turns whatever the library raises into the error that `complain` makes of its first line."""
    try:
        yield
    except OnDeviceError:
        raise
    except BaseException as error:  # a panic of the library's Rust code is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise complain(str(error).partition("\n")[0].rstrip(".")) from None


def _failed(what: str) -> BadFile:
    return BadFile(f"The tokenizer fails on this text: {what}.", HINT)


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
            return self._encode(text, parse_special).ids

    def _encode(self, text: str, parse_special: bool, add_special: bool = False) -> Encoding:
        with told(_failed):
            self.backend.encode_special_tokens = not parse_special
            return self.backend.encode(text, add_special_tokens=add_special)

    def partition(self, text: str) -> list[int | str]:
        with self._lock:
            found = self._encode(text, parse_special=True)
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
                return self._encode(text, parse_special=False).ids
            finally:
                self._metaspace.prepend_scheme = "first"

    def added(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the post-processor puts before and after a text."""
        bare = self._encode("a", parse_special=True).ids
        full = self._encode("a", parse_special=True, add_special=True).ids
        for before in range(len(full) - len(bare) + 1):
            if full[before : before + len(bare)] == bare:
                return tuple(full[:before]), tuple(full[before + len(bare) :])
        return (), ()


def _metaspace(backend: Backend) -> Metaspace | None:
    """The step that puts a space in front of a text, if there is one."""
    step = backend.pre_tokenizer
    steps = step if isinstance(step, Sequence) else [step]
    return next((s for s in steps if isinstance(s, Metaspace)), None)
