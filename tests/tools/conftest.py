"""A folder quantized tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest


@pytest.fixture
def quantize_folder():
    """quantize_folder(source, dest, {"": (4, 32), "…down_proj": (8, 64)}): the model in `source` with every matrix
    quantized as said for the end of its module's name, else as under ""."""
    from ondevice.checkpoint import Spec, open_checkpoint, write_folder
    from ondevice.schemes import quantize_affine, to_float
    from ondevice.tensors import dense

    def write(source: Path, dest: Path, settings: Mapping[str, tuple[int, int]], dtype: str = "float16") -> Path:
        with open_checkpoint(source) as checkpoint:
            specs = []
            for name in checkpoint.names:
                values, module = to_float(checkpoint[name]), name.removesuffix(".weight")
                bits, group = next((own for end, own in settings.items() if end and module.endswith(end)), settings[""])
                made = dense(values) if values.ndim == 1 else quantize_affine(values, bits, group, dtype)
                specs.append(Spec(name, made.shape, made.format, lambda made=made: made))
            files = {name: path.read_bytes() for name, path in checkpoint.files.items()}
            write_folder(dest, checkpoint.config, specs, files)
        return dest

    return write
