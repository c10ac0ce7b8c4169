"""The model that is pruned: its file, and, once something wants to run it, the model opened."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ...checkpoint import open_checkpoint
from ...models.families import family_of
from ...models.parameters import Parameters
from ...registry import create_backend
from ...runtime.session import Session, open_session
from ...runtime.side_files import side_files, tokenizer_of
from ...runtime.tokenizer import Tokenizer, load_tokenizer
from ...schemes import to_float
from ...tensors import Dense
from ..calibration import Sampling, samples
from ..progress import Progress
from ..quantize.matrices import require_finite
from .cutting import require_dense, require_place
from .options import Options
from .tokens import encoding, rewritten


class Subject(ExitStack):
    """A context that opens what it is asked for and closes it at the end. windows: what to calibrate on, int32
    [N, length], where it is there already. expected: how often each token comes, once that is known."""

    def __init__(self, path: Path, options: Options, windows: np.ndarray | None = None):
        super().__init__()
        self.path, self.options = path, options
        self.checkpoint = self.enter_context(open_checkpoint(path))
        try:
            self.family, self.hf_config = family_of(self.checkpoint)
            self.config = self.family.config(self.hf_config)
            self.parameters = Parameters(self.family, self.config, self.checkpoint)
        except BaseException:
            self.close()
            raise
        self._windows = windows
        self.counted: np.ndarray | None = None
        self.expected: np.ndarray | None = None

    @cached_property
    def session(self) -> Session:
        """On the CPU: pruning looks at activations on the host anyway."""
        return self.enter_context(open_session(self.path, backend=self.ops))

    @cached_property
    def ops(self):
        return create_backend("cpu")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_of(self.checkpoint)

    @cached_property
    def files(self) -> dict[str, bytes]:
        """Everything beside config.json and the weights."""
        return side_files(self.checkpoint)

    def windows(self, tokens: np.ndarray | None = None) -> Generator[Progress, None, np.ndarray]:
        """What to calibrate on, int32 [N, length]; made once. tokens: those that stay, where not all do: the same text
        as it will be cut then, so that what else goes is chosen by what will be read (as COMPACT does, arXiv
        2509.06836, which leaves rare tokens out); the ids are still the whole vocabulary's."""
        if self._windows is None:
            o = self.options
            for event in samples(self.session, o.calibration, o.tokens, o.length, o.seed):
                if isinstance(event, Sampling):
                    yield Progress("The model writes its own calibration text", event.done, event.total, "tokens")
                else:
                    self._windows = event
        return self._windows if tokens is None else self._recut(self._windows, tokens)

    def _recut(self, windows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        cut, ids = self.with_tokens(tokens), []
        for window in windows.tolist():
            ids += cut.encode(self.tokenizer.decode(window, skip_special=False), add_special=False)
        length = min(windows.shape[1], len(ids))
        return tokens[ids[: len(ids) // length * length]].astype(np.int32).reshape(-1, length)

    def with_tokens(self, tokens: np.ndarray) -> Tokenizer:
        """The tokenizer that will be left where these stay."""
        with TemporaryDirectory() as folder:
            for name, content in rewritten(encoding(self.files), self.files, tokens).items():
                (Path(folder) / name).write_bytes(content)
            return load_tokenizer(folder)

    def calibrate_on(self, windows: np.ndarray, counted: np.ndarray | None = None) -> None:
        """These alone, from now on: the rest is for judging. counted: of the same text, what
        tokens are counted in, which is cheap; else the windows."""
        self._windows, self.expected, self.counted = windows, None, windows if counted is None else counted

    def check(self) -> None:
        """Whether the weights can be worked on as asked, before anything is. Raises Unsupported for quantized ones that
        would have to change, BadFile, naming the tensor, where a number is NaN or infinite."""
        o = self.options
        changed = o.sparsity or o.channels or o.heads
        for name in self.parameters:
            tensor = self.parameters[name]
            if changed and not o.dequantize:
                require_dense(tensor)
            if not o.dequantize:
                require_place(tensor)
            if isinstance(tensor.format, Dense):
                require_finite(name, np.array(to_float(tensor)), self.parameters)
            self.release(name)

    def numbers(self, name: str) -> np.ndarray:
        """A parameter as float32; its pages are given back."""
        values = np.array(to_float(self.parameters[name]))
        self.release(name)
        return values

    def release(self, name: str) -> None:
        for stored in self.parameters.stored(name):
            self.checkpoint.release(stored)
