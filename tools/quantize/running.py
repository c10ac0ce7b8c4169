"""The whole of it: a model's file in, a quantized folder out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from ...backends.base import Backend
from ...checkpoint import Checkpoint, open_checkpoint
from ...checkpoint.write import require_new
from ...errors import Unsupported
from ...models.families import NameMap, family_of
from ...models.parameters import Parameters
from ...registry import create_backend
from ...runtime.session import open_session
from ...tensors import Affine, Blocks, Tensor
from ..calibration import Sampling, samples
from ..progress import Progress
from ..work import Work, identity
from .allocation import allocate, require_reachable
from .calibrated import Rounding
from .matrices import (
    affine_bytes,
    fitted_group,
    matrices,
    numbers,
    require_finite_all,
    require_unquantized,
    scale_dtype,
)
from .options import Options
from .rounding import nearest
from .weighing import Given, weigh
from .writing import Result, write

VERSION = 1  # of the method: what an older one has left is not gone on with


Told = Callable[[Progress], None]


def quantize(
    source: Path, dest: Path, options: Options, progress: Told = lambda event: None, backend: str | Backend = "cpu",
    given: Given | None = None,
) -> Result:  # fmt: skip
    """A checkpoint as the new folder `dest`, which appears complete or not at all. Long work is kept in a hidden folder
    beside it as it is done, and gone on with when the same is asked for again. Raises OnDeviceError's children."""
    started = time.perf_counter()
    require_new(dest)
    if options.method == "distill":
        from .distilling import distill  # training is loaded for those who use it

        return distill(source, dest, options, progress, backend)
    with open_checkpoint(source) as checkpoint:
        job = _Job(source, dest, options, progress, checkpoint)
        result = job.nearest() if options.method == "rtn" else job.calibrated(backend, given)
    return replace(result, seconds=time.perf_counter() - started)


class _Job:
    def __init__(self, source: Path, dest: Path, options: Options, progress: Told, checkpoint: Checkpoint):
        self.source, self.dest, self.options, self.progress = source, dest, options, progress
        self.family, self.hf_config = family_of(checkpoint)
        self.config = self.family.config(self.hf_config)
        self.parameters = Parameters(self.family, self.config, checkpoint)
        if not options.requantize:
            require_unquantized(self.parameters)

    def nearest(self) -> Result:
        plan, notes = uniform(self.parameters, self.family.names, self.options)
        if self.options.mode == "mxfp4":
            plan = dict.fromkeys(plan, Blocks("MXFP4"))
        return self._write(plan, lambda name: nearest(numbers(self.parameters, name), plan[name]), notes)

    def calibrated(self, backend: str | Backend, given: Given | None) -> Result:
        plan, notes = uniform(self.parameters, self.family.names, self.options)
        if given is None:
            if self.options.method == "auto":
                require_reachable(self.parameters, plan, *self._sizes(plan))
            require_finite_all(self.parameters)
        work = Work(self.dest, fingerprint(self.source, self.options))
        if given is not None and given.hurried:
            result = self._write(given.plan, self._kept(work, given.plan, hurried=True), notes)
            work.remove()
            return result
        ops = backend if isinstance(backend, Backend) else create_backend(backend, exact=True)
        ids = self._samples(ops, work) if given is None or given.ids is None else given.ids
        hessians: Mapping[str, np.ndarray] = {}
        if given is not None:
            plan, hessians = given.plan, given.hessians
        elif self.options.method == "auto":
            plan, hessians = self._planned(plan, ops, ids, work)
        method = "gptq" if self.options.method == "auto" else self.options.method
        rounding = Rounding(self.config, self.parameters, plan, method, hessians)
        for done, total in rounding.run(ops, ids, work):
            self.progress(Progress("Rounding", done, total, "stages"))
        plan = {**plan, **rounding.changed}
        result = self._write(plan, self._kept(work, plan), (*notes, *rounding.notes))
        work.remove()
        return result

    def _kept(self, work: Work, plan: Mapping[str, Affine], hurried: bool = False) -> Callable[[str], Tensor]:
        """What finds a finished tensor in the work; one stage is held at a time. hurried: others are the nearest."""
        stage = lru_cache(maxsize=1)(lambda prefix: work.tensors(prefix, self.parameters, plan) or {})

        def made(name: str) -> Tensor:
            prefix = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name
            if name in (found := stage(prefix)):
                return found[name]
            if hurried and name not in stage("head"):
                return nearest(numbers(self.parameters, name), plan[name])
            return stage("head")[name]  # a tied embedding may be rounded last

        return made

    def _write(self, plan: Mapping[str, Affine], make, notes: tuple[str, ...]) -> Result:
        def written(done: int, total: int) -> None:
            self.progress(Progress("Writing", done, total, "bytes"))

        return write(self.dest, self.parameters, self.family, self.hf_config, plan, make, written, notes)

    def _samples(self, ops: Backend, work: Work) -> np.ndarray:
        kept = work.arrays("samples")
        if kept is not None:
            return kept["ids"]
        options = self.options
        with open_session(self.source, backend=ops) as session:
            for event in samples(session, options.calibration, options.tokens, options.window, options.seed):
                if isinstance(event, Sampling):
                    self.progress(Progress("Sampling", event.done, event.total, "tokens"))
        work.keep("samples", {"ids": event})
        return event

    # -------------------------------------------------------------------------------------------- what each becomes

    def _planned(
        self, plan: dict[str, Affine], ops: Backend, ids: np.ndarray, work: Work
    ) -> tuple[dict[str, Affine], dict[str, np.ndarray]]:
        """What each matrix of `plan` should become; Hessians of embedding and head."""
        kept, hessians = work.record("plan"), work.arrays("hessians")
        if kept is None or hessians is None:
            weighed = weigh(self.config, self.parameters, list(plan), ops, ids, self.options.seed, self.progress)
            hessians, chosen = weighed.hessians, allocate(weighed.table, *self._sizes(plan))
            work.keep("hessians", hessians)
            kept = {name: asdict(choice.form) for name, choice in chosen.items()}
            work.keep_record("plan", kept)
        return {name: Affine(**form) for name, form in kept.items()}, hessians

    def _sizes(self, plan: Mapping[str, Affine]) -> tuple[int, int]:
        """Bytes that were asked for (without a target: what `plan`, the same bits for all, takes) and those of what is
        not quantized."""
        parameters, options = self.parameters, self.options
        fixed = sum(parameters[name].nbytes for name in parameters if name not in plan)
        if options.target_bytes is not None:
            return options.target_bytes, fixed
        if options.target_bpw is not None:
            return int(options.target_bpw * sum(parameters[name].size for name in parameters) / 8), fixed
        return fixed + sum(affine_bytes(parameters.shapes[name], form) for name, form in plan.items()), fixed


def fingerprint(source: Path, options: Options) -> dict:
    """Of all that a result depends on."""
    return {"version": VERSION, "files": identity(source, options.calibration), **asdict(options)}


def uniform(parameters: Parameters, names: NameMap, options: Options) -> tuple[dict[str, Affine], tuple[str, ...]]:
    """The same bits and group for every matrix, as near as rows allow; and what must stay as it is."""
    plan, notes = {}, []
    for name in matrices(parameters):
        columns = parameters.shapes[name][-1]
        group = fitted_group(columns, options.group_size)
        spelled, views = names.written(name, mlx=True)
        if group is None or views:
            why = "it is stored transposed or in another" if views else f"no group divides its rows of {columns}"
            notes.append(f"{spelled} stays as it is: {why}.")
        else:
            plan[name] = Affine(options.bits, group, scale_dtype(parameters[name]))
    if not plan:
        raise Unsupported(
            "There is nothing to quantize: no group of 32 or more divides a row.", notes[0] if notes else ""
        )
    return plan, tuple(dict.fromkeys(notes))  # once for what is in one tensor
