"""The whole of it: a model's file in, a smaller model's folder out."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from ...checkpoint import Spec, release, write_folder
from ...errors import OnDeviceError
from ...models.parameters import expected
from ...schemes import row
from ...tensors import Tensor
from . import vocabulary
from .cutting import Cut, hugging_face
from .events import Progress, Result, Scores, Size
from .options import Options
from .subject import Subject
from .tokens import Merges, renamed_ids, rewritten

Choice = Generator[Progress, None, tuple[Cut, Scores]]


def prune(source: Path, dest: Path | None, options: Options) -> Iterator[Progress | Result]:
    """Ends with the Result. dest: a new folder, which appears complete or not at all; None: a rehearsal, nothing is
    written. Raises OnDeviceError's children."""
    started = time.perf_counter()
    if dest is not None and (dest.exists() or dest.is_symlink()):
        raise OnDeviceError(f"{dest} exists already.", "Choose another name, or remove it first.")
    with Subject(source, options) as subject:
        cut, found = Cut.nothing(subject.config, "bfloat16" if options.dequantize else None), []
        for choose in _choosers(options):
            cut, scores = yield from choose(subject, cut)
            found.append(scores)
        result = yield from _write(subject, cut, dest)
        yield replace(result, scores=tuple(found), seconds=time.perf_counter() - started)


def _choosers(options: Options):
    if options.vocabulary or options.keep_vocabulary:
        yield _tokens


def _tokens(subject: Subject, cut: Cut) -> Choice:
    kept, scores = yield from vocabulary.choose(subject)
    return replace(cut, tokens=kept), scores


def _write(subject: Subject, cut: Cut, dest: Path | None) -> Generator[Progress, None, Result]:
    hf, files = subject.hf_config, subject.files
    if cut.tokens is not None:
        hf = renamed_ids(hf, {int(id): at for at, id in enumerate(cut.tokens)})
        files = rewritten(Merges(files), files, cut.tokens)
    hf = hugging_face(cut, hf, subject.family.config)
    specs = list(_specs(subject, cut))
    if dest is not None:
        yield Progress("Writing", 0, 1)
        write_folder(dest, hf, specs, files)
    before = Size(sum(subject.parameters[name].size for name in subject.parameters), subject.checkpoint.nbytes)
    after = Size(sum(int(np.prod(s.shape, dtype=np.int64)) for s in specs), sum(s.nbytes for s in specs))
    return Result(dest, before, after, (), _sizes(cut))


def _specs(subject: Subject, cut: Cut) -> Iterator[Spec]:
    """What is written, in Hugging Face's names; a stack of experts is cut once for all of them."""
    for name, shape in expected(cut.made).items():
        load = lru_cache(maxsize=1)(partial(_load, subject, cut, name))
        form = load().format
        load.cache_clear()
        spellings = subject.family.names.spellings(name)
        quantized = form.__class__.__name__ != "Dense"
        spelled = next((s for s in spellings if quantized and "{e}" not in s), spellings[0])
        if "{e}" not in spelled:
            yield Spec(spelled, shape, form, load.__wrapped__)
            continue
        for e in range(shape[0]):
            yield Spec(spelled.replace("{e}", str(e)), shape[1:], form, lambda load=load, e=e: row(load(), e))


def _load(subject: Subject, cut: Cut, name: str) -> Tensor:
    made = cut.load(subject.parameters, name)
    for stored in subject.parameters.stored(cut.original(name)):
        release(subject.checkpoint[stored])
    return made


def _sizes(cut: Cut) -> dict[str, tuple[int, int]]:
    old, new = cut.config, cut.made
    return {"tokens": (old.vocab, new.vocab), "layers": (len(old.layers), len(new.layers))}
