"""The looser check: activations rounded to int8 by groups pass as a default mode; rounded more coarsely they don't."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.backends.reference import HostWeight, NumpyKernels, ReferenceBackend
from ondevice.testing.conformance import *  # noqa: F403
from ondevice.testing.suite import run

del test_conformance  # noqa: F821  (the other face of the suite is for exact backends)


class Rounding(NumpyKernels):
    """Activations in front of quantized weights, in `steps` levels either side of zero."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps

    def linear(self, x, weight, bias=None):
        return super().linear(self.rounded(x, weight), weight, bias)

    def expert_linear(self, x, weight, bias, gates, ids):
        return super().expert_linear(self.rounded(x, weight), weight, bias, gates, ids)

    def rounded(self, x, weight):
        if not (isinstance(weight, HostWeight) and weight.tensor.quantized):
            return x
        groups = x.reshape(*x.shape[:-1], -1, 32)
        scale = np.abs(groups).max(-1, keepdims=True) / self.steps + 1e-12
        return (np.rint(groups / scale) * scale).reshape(x.shape)


class DefaultMode(ReferenceBackend):
    exact = False


@pytest.fixture(scope="module")
def default_backend():
    return DefaultMode(Rounding(127))


def test_coarser_rounding_is_rejected() -> None:
    failures = run(DefaultMode(Rounding(15)), lambda case: case.name.startswith(("weights.", "compiled.")))
    assert {f.case.name.split("[")[0] for f in failures} >= {"weights.linear", "weights.experts"}
