"""The cpu backend against the reference, with every set of kernels that this processor can run."""

from __future__ import annotations

import pytest

from ondevice.backends.cpu import create
from ondevice.testing.conformance import *  # noqa: F403

_native = pytest.importorskip("ondevice.backends.cpu._native", reason="the kernels are not compiled")


@pytest.fixture(scope="module", params=_native.variants())
def kernels(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def backend(kernels):
    return create(exact=True, kernels=kernels, threads=2)


@pytest.fixture(scope="module")
def default_backend(kernels):
    return create(kernels=kernels, threads=2)
