"""Several parameters in one tensor of a file."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from ondevice.models.families.writing import Piece, specs
from ondevice.registry import families
from ondevice.tensors import Dense, Tensor, store

SHAPE = (4, 8)


def piece(name: str, dtype: str) -> Piece:
    form = Dense(dtype)
    return Piece(name, SHAPE, form, lambda: Tensor(SHAPE, form, {"weight": store(np.ones(SHAPE, np.float32), dtype)}))


@pytest.mark.parametrize(("one", "other"), itertools.permutations(["float32", "float16", "bfloat16"], 2))
def test_the_widest_type_of_several_in_one_tensor(one, other):
    """In whichever order they come, and in every process."""
    config = SimpleNamespace(layers=[SimpleNamespace(mixer=None)])
    pieces = [piece("layers.0.mlp.gate", one), piece("layers.0.mlp.up", other)]
    (made,) = specs(families()["granite4"].names, config, pieces)
    assert made.format == Dense("float32" if "float32" in (one, other) else one)
    assert (made.load().format, made.load().shape) == (made.format, (8, 8))
