"""Writing a GGUF file through the `gguf` package: tensor by tensor into a temporary sibling that is renamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..tensors import STORAGE, Blocks
from .files import release
from .gguf import BLOCK_TYPES, DENSE_TYPES
from .write import Spec, appearing

if TYPE_CHECKING:
    from gguf import GGUFWriter

TYPES = {name: number for number, name in (DENSE_TYPES | BLOCK_TYPES).items()}  # dtype or kind -> ggml's number
SIGNED = frozenset({"tokenizer.ggml.token_type", "general.sampling.top_k"})  # int32 by convention; others uint32
ARCHITECTURE = "general.architecture"


def write_gguf(
    dest: str | Path,
    metadata: Mapping[str, Any],
    specs: Sequence[Spec],
    written: Callable[[Spec], None] = lambda spec: None,
    check: Callable[[Path], None] = lambda path: None,
) -> None:
    """Write metadata and tensors (Dense or Blocks, shapes as [out, in]) as the new file `dest`.

    metadata: bool, int, float (kept as float32), str and lists of one of them; one of them is general.architecture.
    written: told of each tensor. check: shown the finished file before it gets its name; what it raises prevents that.
    Peak memory is one tensor. Raises OnDeviceError as `write_folder` does.
    """
    import gguf

    with appearing(Path(dest), sum(spec.nbytes for spec in specs)) as temporary:
        writer = gguf.GGUFWriter(temporary, metadata[ARCHITECTURE])
        try:
            _describe(writer, metadata, specs)
            for spec in specs:
                tensor = spec.load()
                if (tensor.shape, tensor.format) != (spec.shape, spec.format):
                    raise ValueError(f"{spec.name} came as {tensor.format} {tensor.shape}, not as planned")
                writer.write_tensor_data(np.ascontiguousarray(tensor.parts["weight"]))
                release(tensor)
                del tensor  # else it would stay in memory while the next one is made
                written(spec)
            writer.flush()
            os.fsync(writer.fout[0].fileno())
        finally:
            writer.close()
        check(temporary)


def _describe(writer: GGUFWriter, metadata: Mapping[str, Any], specs: Sequence[Spec]) -> None:
    """Everything that stands in front of the numbers."""
    from gguf import GGMLQuantizationType

    for key, value in metadata.items():
        if key != ARCHITECTURE and value != []:  # the package writes the one itself and refuses the other
            writer.add_key_value(key, value, *_kinds(key, value))
    for spec in specs:
        blocks = isinstance(spec.format, Blocks)
        kind = GGMLQuantizationType(TYPES[spec.format.kind if blocks else spec.format.dtype])
        dtype = np.dtype(np.int32) if blocks else STORAGE[spec.format.dtype]  # uint8 would mean a shape in bytes
        writer.add_tensor_info(spec.name, spec.shape, dtype, spec.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _kinds(key: str, value: Any) -> tuple:
    """GGUF's type of a value, and that of its elements where it is a list."""
    from gguf import GGUFValueType as Type

    if isinstance(value, list):
        return Type.ARRAY, _kinds(key, value[0])[0]
    if isinstance(value, bool):
        return Type.BOOL, None
    if isinstance(value, int):
        signed = key in SIGNED or value < 0
        return (Type.INT32 if signed else Type.UINT32), None
    return (Type.STRING if isinstance(value, str) else Type.FLOAT32), None
