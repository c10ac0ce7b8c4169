"""A model of random weights, to watch training from the very beginning."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from .. import noise
from ..checkpoint import folder, open_checkpoint, write_folder
from ..checkpoint.files import read_object
from ..errors import Unsupported
from ..models.families import Family, family_for, family_of, text_part
from ..models.families.writing import Piece
from ..models.families.writing import specs as laid_out
from ..models.parameters import expected
from ..runtime.side_files import side_files
from ..tensors import Dense, Tensor, dense

DEVIATION = 0.02  # of matrices; gains begin as 1, biases as 0 (GPT-2's choice, Radford et al. 2019)
RATE = 1e-3  # the learning rate, where none is given: random weights bear more than trained ones


@contextmanager
def untrained(source: Path, seed: int) -> Iterator[Path]:
    """A temporary model folder with the config, tokenizer and template of `source` (a model, or a folder of these files
    alone) and weights drawn by the seed. Raises Unsupported for models with experts or recurrent states."""
    family, hf, files = _described(source)
    config = family.config(hf)
    shapes = expected(config)
    if any(".moe." in name or ".delta." in name for name in shapes):
        raise Unsupported("Models with experts or states are not trained from scratch.", "Take another config.")
    draws = {name: partial(_drawn, name, shape, seed, config.norm_offset) for name, shape in shapes.items()}
    pieces = (Piece(name, shapes[name], Dense("float32"), draw) for name, draw in draws.items())
    with tempfile.TemporaryDirectory(prefix="ondevice-scratch-") as temporary:
        dest = Path(temporary) / "model"
        specs = list(laid_out(family.names, config, pieces))
        write_folder(dest, {k: v for k, v in hf.items() if not k.startswith("quantization")}, specs, files)
        yield dest


def _described(source: Path) -> tuple[Family, dict, dict[str, bytes]]:
    if source.is_dir() and not any(source.glob("*.safetensors")):
        hf = dict(text_part(read_object(source / "config.json")))
        files = {name: path.read_bytes() for name, path in folder.side_files(source).items()}
        return family_for(hf, source), hf, files
    checkpoint = open_checkpoint(source)
    try:
        family, hf = family_of(checkpoint)
        return family, dict(hf), side_files(checkpoint)
    finally:
        checkpoint.close()


def _drawn(name: str, shape: tuple[int, ...], seed: int, offset: float) -> Tensor:
    if len(shape) == 1:
        bias = name.endswith(".bias")
        return dense(np.full(shape, 0.0 if bias else 1.0 - offset, np.float32))
    draw = noise.generator(seed, f"{name} from scratch")
    return dense(draw.standard_normal(shape, np.float32) * np.float32(DEVIATION))
