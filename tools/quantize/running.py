"""The whole of it: a model's file in, a quantized folder out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ...checkpoint import open_checkpoint
from ...errors import OnDeviceError
from ...models.families import family_of
from ...models.parameters import Parameters
from ...tensors import Affine
from .matrices import fitted_group, matrices, numbers, require_unquantized, scale_dtype
from .options import Options
from .rounding import nearest
from .writing import Result, write


@dataclass(frozen=True)
class Progress:
    """How far a stage has come; unit: of done and total, for people."""

    stage: str
    done: float
    total: float
    unit: str = ""


def quantize(
    source: Path, dest: Path, options: Options, progress: Callable[[Progress], None] = lambda event: None
) -> Result:
    """A checkpoint as the new folder `dest`, which appears complete or not at all. Raises OnDeviceError's children."""
    started = time.perf_counter()
    if dest.exists() or dest.is_symlink():
        raise OnDeviceError(f"{dest} exists already.", "Choose another name, or remove it first.")
    with open_checkpoint(source) as checkpoint:
        family, hf_config = family_of(checkpoint)
        parameters = Parameters(family, family.config(hf_config), checkpoint)
        if not options.requantize:
            require_unquantized(parameters)
        plan, notes = uniform(parameters, options)
        result = write(
            dest, parameters, family, hf_config, plan, lambda name: nearest(numbers(parameters, name), plan[name]),
            lambda done, total: progress(Progress("Rounding", done, total, "bytes")), notes,
        )  # fmt: skip
        return replace(result, seconds=time.perf_counter() - started)


def uniform(parameters: Parameters, options: Options) -> tuple[dict[str, Affine], tuple[str, ...]]:
    """The same bits and group for every matrix, as near as rows allow; and what must stay as it is."""
    plan, notes = {}, []
    for name in matrices(parameters):
        columns = parameters.shapes[name][-1]
        group = fitted_group(columns, options.group_size)
        if group is None:
            notes.append(f"{parameters.stored(name)[0]} stays as it is: no group divides its rows of {columns}.")
        else:
            plan[name] = Affine(options.bits, group, scale_dtype(parameters[name]))
    return plan, tuple(notes)
