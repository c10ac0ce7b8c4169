"""The whole of it: a model and adapters in, a folder out, with how far the result is from what went in."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...checkpoint import write_folder
from ...checkpoint.write import require_new
from ...errors import BadOption, OnDeviceError
from ...models.decoder import Decoder
from ...runtime.session import Session
from ...runtime.side_files import side_files
from ...schemes import AFFINE_BITS, label
from ..calibration import Sampling, samples
from ..convert.planning import FLOATS
from ..progress import Progress
from .drift import Drift, drift
from .weights import Weights

LADDER = (5, 6, 8)  # bits that touched tensors may be raised to
NOISE = 1e-7  # nats: less than float32 tells apart


@dataclass(frozen=True)
class Options:
    """dtype: everything dense, in this type. bits, group_size: of the touched tensors that are quantized; None: as they
    were, or more where the adapter would be lost otherwise. share: how much of the adapter's own effect (mean KL) may
    be lost. text: what it is measured on, `tokens` of it, and as many more that tell how to round; None: what the
    adapted model itself says, drawn with `seed`."""

    dtype: str | None = None
    bits: int | None = None
    group_size: int | None = None
    share: float = 0.25
    text: Path | None = None
    tokens: int = 512
    seed: int = 0

    def __post_init__(self):
        if self.dtype not in (None, *FLOATS):
            raise BadOption(f"There is no type {self.dtype!r}.", f"Choose from {', '.join(FLOATS)}.")
        if self.dtype and (self.bits or self.group_size):
            raise BadOption("--dtype leaves nothing quantized, so --bits has no place.", "Give one of the two.")
        if self.bits not in (None, *AFFINE_BITS):
            raise BadOption(f"{self.bits} bits are not supported.", f"Choose from {', '.join(map(str, AFFINE_BITS))}.")
        if not self.share > 0:
            raise BadOption(f"A share of {self.share} makes no sense.", "Give a number above 0, such as 0.25.")


@dataclass(frozen=True)
class Measured:
    """One way to write it: bits of the touched tensors that are quantized (0: as they were), and what is lost."""

    bits: int
    drift: Drift
    share: float  # of the adapter's effect


@dataclass(frozen=True)
class Fused:
    """What was written. effect: from the model alone to the adapted one; drift: from the adapted one to the result.
    tried: every way that was measured, the last one written. touched: tensors that adapters changed."""

    path: Path
    nbytes: int
    formats: dict[str, int]
    touched: int
    effect: Drift
    tried: tuple[Measured, ...]
    untied: bool
    seconds: float

    @property
    def drift(self) -> Drift:
        return self.tried[-1].drift


def fuse(session: Session, dest: Path, options: Options) -> Iterator[Progress | Measured | Fused]:
    """The session's model with the adapters attached to it, as the new folder `dest`; ends with Fused.

    The session should be exact. Raises OnDeviceError, and writes nothing, where more of the adapter's effect would be
    lost than `share` allows.
    """
    started = time.perf_counter()
    require_new(dest)
    if not session.attached:
        raise BadOption("There is no adapter to fuse.", "Give one.")
    weights = Weights(session.parameters, session.config, [(a.adapter, a.weight) for a in session.attached])
    _choose(weights, options, 0)  # says what cannot be before anything takes time
    for event in samples(session, options.text, 2 * options.tokens, min(256, options.tokens), options.seed):
        if isinstance(event, Sampling):
            yield Progress("Sampling from the adapted model", event.done, event.total, "tokens")
    seen, ids = _halves(event)
    if not options.dtype:
        yield Progress("Observing", 0, 1)
        weights.observe(session.decoder, seen)
    alone = Decoder(session.config, session.backend, session.weights)
    effect = drift(session.decoder, alone, ids)
    tried: list[Measured] = []
    least: int | None = 0
    while least is not None:
        yield Progress("Measuring", len(tried), len(tried) + 1, "ways")
        _choose(weights, options, least)
        tried.append(_measured(session, weights, ids, effect, options.bits or least))
        yield tried[-1]
        least = _more(weights.bits, tried[-1].share, options)
    if tried[-1].share > options.share:
        raise _lost(tried, options, bool(weights.bits))
    yield from _written(session, weights, dest, effect, tried, started)


def _halves(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the rounding may look at, and what it is then measured on: no token is in both."""
    if len(ids) == 1:
        ids = ids[:, : ids.shape[1] // 2 * 2].reshape(2, -1)
    return ids[::2], ids[1::2]


def _choose(weights: Weights, options: Options, least: int) -> None:
    if options.dtype:
        weights.make_dense(options.dtype)
    else:
        weights.set_bits(options.bits, options.group_size, least)


def _more(bits: set[int], share: float, options: Options) -> int | None:
    """How many bits to try next; None: these are right, or there are no more. One bit more halves the error of each
    number; what is lost falls by as much at least, once steps are no longer much larger than the change."""
    if share <= options.share or options.bits or not bits:
        return None
    wanted = min(bits) + math.ceil(math.log2(share / options.share))
    more = [level for level in LADDER if level > min(bits)]
    return next((level for level in more if level >= wanted), more[-1] if more else None)


def _measured(session: Session, weights: Weights, ids: np.ndarray, effect: Drift, bits: int) -> Measured:
    """The fused model run from memory, before anything is written."""
    ops = session.backend
    changed = {name: ops.prepare(weights[name]) for name in weights.touched}
    if session.config.tied and not weights.tied:
        changed = {"head": session.weights["embed"]} | changed
    model = Decoder(session.config, ops, {**session.weights, **changed})
    found = drift(session.decoder, model, ids)
    own = set(map(id, session.weights.values()))
    for weight in changed.values():
        if id(weight) not in own:
            ops.release(weight)
    lost = max(found.mean - NOISE, 0)
    return Measured(bits, found, lost / effect.mean if effect.mean > NOISE else float(lost > 0))


def _lost(tried: Sequence[Measured], options: Options, quantized: bool) -> OnDeviceError:
    last = tried[-1]
    what = f"in {options.dtype}" if options.dtype else f"in {last.bits} bits" if last.bits else "as the model is stored"
    hint = "Leave out --bits, so that more are taken where they are needed, or" if options.bits else "Use"
    dtype = "bfloat16" if quantized else "float32"
    return OnDeviceError(
        f"Fused {what}, {last.share:.0%} of the adapter's effect would be lost (KL {last.drift.mean:.2g} of what it "
        f"changes; {options.share:.0%} are allowed). Nothing was written.",
        f"{hint} --dtype {dtype}; or allow more with --max-loss.",
    )


def _written(
    session: Session, weights: Weights, dest: Path, effect: Drift, tried: Sequence[Measured], started: float
) -> Iterator[Progress | Fused]:
    specs = list(weights.specs(session.family.names))
    total = sum(spec.nbytes for spec in specs)
    formats: Counter[str] = Counter()
    for spec in specs:
        formats[label(spec.format)] += spec.nbytes
    yield Progress("Writing", 0, total, "bytes")
    write_folder(dest, _config(session, weights), specs, side_files(session.checkpoint))
    untied, seconds = session.config.tied and not weights.tied, time.perf_counter() - started
    made = dict(formats.most_common())
    yield Fused(dest, total, made, len(weights.touched), effect, tuple(tried), untied, seconds)


def _config(session: Session, weights: Weights) -> dict:
    """config.json of the result."""
    kept = {key: value for key, value in session.hf_config.items() if key != "torch_dtype"}
    untied = {"tie_word_embeddings": False} if session.config.tied and not weights.tied else {}
    return kept | {"dtype": weights.formats["embed"].dtype} | untied
