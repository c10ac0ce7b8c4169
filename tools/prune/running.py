"""The whole of it: a model's file in, a smaller model's folder out."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ...checkpoint import Spec, write_folder
from ...checkpoint.write import scratch
from ...errors import OnDeviceError
from ...models.families.writing import Piece, specs
from ...models.parameters import expected
from ...tensors import Tensor
from ..progress import Progress
from . import depth, experts, sparsity, target, vocabulary, width
from .cutting import Cut, hugging_face, sizes
from .events import Result, Scores, Size
from .options import Options
from .subject import Subject
from .tokens import encoding, renamed_ids, rewritten

WORSE = "Healing made it worse: it was left as pruned. Give more --heal-minutes, or other data."

Choice = Generator[Progress, None, tuple[Cut, Scores]]


def prune(source: Path, dest: Path | None, options: Options) -> Iterator[Progress | Result]:
    """Ends with the Result. dest: a new folder, which appears complete or not at all; None: a rehearsal, nothing is
    written. Raises OnDeviceError's children."""
    started = time.perf_counter()
    if dest is not None and (dest.exists() or dest.is_symlink()):
        raise OnDeviceError(f"{dest} exists already.", "Choose another name, or remove it first.")
    if dest is not None and not dest.absolute().parent.is_dir():
        raise OnDeviceError(f"There is no folder {dest.absolute().parent} to write to.", "Create it first.")
    with Subject(source, options) as subject:
        subject.check()
        found, notes = [], ()
        if options.target:
            subject.options, scores, notes = yield from target.choose(subject, chosen, write, dest)
            found.append(scores)
        cut, scores = yield from chosen(subject)
        make = write_healed if options.heal and dest is not None else write
        result = yield from make(subject, cut, dest)
        seconds, notes = time.perf_counter() - started, (*notes, *result.notes)
        yield replace(result, scores=(*found, *scores), notes=notes, seconds=seconds)


def chosen(subject: Subject) -> Generator[Progress, None, tuple[Cut, list[Scores]]]:
    """What stays, as the subject's options say, and why."""
    cut, found = Cut.nothing(subject.config, "bfloat16" if subject.options.dequantize else None), []
    for choose in _choosers(subject.options):
        cut, scores = yield from choose(subject, cut)
        found += [scores] if scores.rows else []
    return cut, found


def _choosers(options: Options):
    if options.vocabulary or options.keep_vocabulary:
        yield _tokens
    if options.layers or options.drop_layers:
        yield depth.choose
    if options.heads:
        yield width.heads
    if options.channels:
        yield width.channels
    if options.experts:
        yield experts.choose
    if options.sparsity:
        yield sparsity.choose


def _tokens(subject: Subject, cut: Cut) -> Choice:
    kept, scores = yield from vocabulary.choose(subject)
    return replace(cut, tokens=kept), scores


def write(subject: Subject, cut: Cut, dest: Path | None) -> Generator[Progress, None, Result]:
    """The cut model at `dest` (None: nowhere), and what has become of its size."""
    hf, files = subject.hf_config, subject.files
    if cut.tokens is not None:
        hf = renamed_ids(hf, {int(id): at for at, id in enumerate(cut.tokens)})
        files = rewritten(encoding(files), files, cut.tokens)
    hf = hugging_face(cut, hf, subject.family.config)
    written = list(_specs(subject, cut))
    if dest is not None:
        yield Progress("Writing", 0, 1)
        write_folder(dest, hf, written, files)
    old, new = sizes(cut.config), sizes(cut.made)
    before = Size(sum(subject.parameters[name].size for name in subject.parameters), subject.checkpoint.nbytes)
    after = Size(sum(int(np.prod(s.shape, dtype=np.int64)) for s in written), sum(s.nbytes for s in written))
    if cut.tensors and subject.options.sparsity:
        before, after = (
            replace(size, nonzero=n) for size, n in zip((before, after), _nonzero(subject, cut), strict=True)
        )
    return Result(dest, before, after, (), {k: (old[k], new[k]) for k in old if old[k]})


def write_healed(subject: Subject, cut: Cut, dest: Path) -> Generator[Progress, None, Result]:
    """The same, taught by the original before it appears. Training is loaded for those who use it."""
    from .healing import heal

    with scratch(dest) as folder:
        pruned, healed = folder / "pruned", folder / "healed"
        result = yield from write(subject, cut, pruned)
        found = yield from heal(subject, cut, pruned, healed)
        (healed if found.better else pruned).rename(dest)
    notes = () if found.better else (WORSE,)
    return replace(result, path=dest, healed=found, notes=notes)


def _nonzero(subject: Subject, cut: Cut) -> tuple[int, int]:
    """Numbers that are not zero, before and after."""
    before = {name: int(np.count_nonzero(subject.numbers(name))) for name in subject.parameters}
    changed = {name: int(np.count_nonzero(tensor.parts["weight"])) for name, tensor in cut.tensors.items()}
    return sum(before.values()), sum((before | changed).values())


def _specs(subject: Subject, cut: Cut) -> Iterator[Spec]:
    """What is written; a stack of experts is cut once for all of them."""
    shapes = expected(cut.made)
    loads = {name: partial(_load, subject, cut, name) for name in shapes}
    return specs(
        subject.family.names, cut.made, (Piece(n, shapes[n], load().format, load) for n, load in loads.items())
    )


def _load(subject: Subject, cut: Cut, name: str) -> Tensor:
    made = cut.load(subject.parameters, name)
    subject.release(cut.original(name))
    return made
