"""The quantized folder: matrices as planned, everything else as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...checkpoint import Spec, write_folder
from ...models.families import Family
from ...models.families.writing import Piece
from ...models.families.writing import specs as laid_out
from ...models.parameters import Parameters
from ...runtime.side_files import side_files
from ...schemes import label, to_dense
from ...tensors import Affine, Blocks, Dense, Tensor
from ..teaching import Taught

Make = Callable[[str], Tensor]  # our name -> what it has become
Plan = Mapping[str, Affine | Blocks | Dense]  # our name -> what it becomes, where it is not left as it is


@dataclass(frozen=True)
class Result:
    """What was made. bpw: bits a parameter, of the whole model. formats: name -> bytes. tensors: Hugging Face's name ->
    format, for each matrix. notes: what could not be done as asked, for people. taught: by distilling. seconds: it
    took."""

    path: Path
    nbytes: int
    bpw: float
    formats: Mapping[str, int]
    tensors: Mapping[str, str]
    notes: tuple[str, ...]
    taught: Taught | None = None
    seconds: float = 0.0


def write(
    dest: Path, parameters: Parameters, family: Family, hf_config: Mapping, plan: Plan, make: Make,
    written: Callable[[int, int], None], notes: tuple[str, ...] = (),
) -> Result:  # fmt: skip
    """`dest` appears complete or not at all; `written` hears bytes done and in all. Raises OnDeviceError."""
    specs = list(laid_out(family.names, family.config(hf_config), _pieces(parameters, plan, make)))
    total, done = sum(spec.nbytes for spec in specs), 0

    def count(spec: Spec) -> None:
        nonlocal done
        done += spec.nbytes
        written(done, total)

    write_folder(dest, hf_config, specs, side_files(parameters.checkpoint), written=count)
    formats: Counter[str] = Counter()
    for spec in specs:
        formats[label(spec.format)] += spec.nbytes
    numbers = sum(parameters[name].size for name in parameters)
    tensors = {spec.name: label(spec.format) for spec in specs if len(spec.shape) > 1}
    return Result(dest, total, 8 * total / numbers, dict(formats.most_common()), tensors, notes)


def _pieces(parameters: Parameters, plan: Plan, make: Make) -> Iterator[Piece]:
    for name in parameters:
        planned = plan.get(name)
        load = partial(make, name) if planned else partial(_kept, parameters, name)
        yield Piece(name, parameters.shapes[name], planned or load().format, load)


def _kept(parameters: Parameters, name: str) -> Tensor:
    """As it is; a GGUF's blocks, which have no place in a folder, dense."""
    tensor = parameters[name]
    return to_dense(tensor, "bfloat16") if isinstance(tensor.format, Blocks) else tensor
