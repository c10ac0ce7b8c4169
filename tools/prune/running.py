"""The whole of it: a model's file in, a smaller model's folder out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoint import Spec, write_folder
from ...checkpoint.write import require_new
from ...errors import BadFile, BadOption, Unsupported
from ...models.families.writing import Piece, specs
from ...models.parameters import expected
from ...tensors import Tensor
from ..progress import Progress
from ..work import Work, identity
from . import depth, experts, sparsity, target, vocabulary, width
from .cutting import Cut, hugging_face, sizes
from .events import Result, Scores, Size
from .options import Options
from .subject import Subject
from .tokens import encoding, renamed_ids, rewritten

VERSION = 1  # of the method: what an older one has left is not gone on with
WORSE = "Healing made it worse: it was left as pruned. Give more --heal-minutes, or other data."

Choice = Generator[Progress, None, tuple[Cut, Scores]]


def prune(source: Path, dest: Path | None, options: Options) -> Iterator[Progress | Result]:
    """Ends with the Result. dest: a new folder, which appears complete or not at all; None: a rehearsal, nothing is
    written. Raises OnDeviceError's children."""
    started = time.perf_counter()
    if dest is not None:
        require_new(dest)
    with Subject(source, options) as subject:
        subject.check()
        if options.heal and dest is not None:
            result = yield from _healed(subject, dest)
        else:
            result, _ = yield from _pruned(subject, dest)
        yield replace(result, seconds=time.perf_counter() - started)


def _pruned(subject: Subject, dest: Path | None) -> Generator[Progress, None, tuple[Result, Cut]]:
    found, notes = [], ()
    if subject.options.target:
        subject.options, scores, notes = yield from target.choose(subject, chosen, write, dest)
        found.append(scores)
    cut, scores = yield from chosen(subject)
    result = yield from write(subject, cut, dest)
    return replace(result, scores=(*found, *scores), notes=notes), cut


def _healed(subject: Subject, dest: Path) -> Generator[Progress, None, Result]:
    """The same, taught by the original before it appears. What is done is kept in a hidden folder beside `dest` until
    then, and gone on with when the same is asked for again. Training is loaded for those who use it."""
    from .healing import heal

    o = subject.options
    work = Work(dest, _fingerprint(subject.path, o), "prune")
    pruned = work.begin() / "pruned"
    try:
        result, tokens = yield from _kept(subject, work, pruned)
        subject.options = o
        healed = work.room("shares") / "healed"
        found = yield from heal(subject, tokens, pruned, healed, work)
    except (BadFile, BadOption, Unsupported):
        work.remove()
        raise
    work.end(healed if found.better else pruned, dest)
    return replace(result, path=dest, healed=found, notes=result.notes if found.better else (*result.notes, WORSE))


def _fingerprint(source: Path, options: Options) -> dict[str, Any]:
    texts = options.calibration, options.keep_vocabulary, options.heal.data
    return {"version": VERSION, "files": identity(source, *texts), **asdict(options)}


def _kept(subject: Subject, work: Work, pruned: Path) -> Generator[Progress, None, tuple[Result, np.ndarray | None]]:
    """What was pruned before, or is now, and the tokens that stayed."""
    tokens = work.arrays("tokens")
    if tokens is None or work.record("result") is None:
        shutil.rmtree(pruned, ignore_errors=True)
        result, cut = yield from _pruned(subject, pruned)
        tokens = {} if cut.tokens is None else {"tokens": cut.tokens}
        work.keep("tokens", tokens)
        work.keep_record("result", asdict(replace(result, path=None)))
    return Result.read(work.record("result")), tokens.get("tokens")


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
