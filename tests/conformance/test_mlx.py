"""The mlx backend beside the reference."""

import pytest

from ondevice.testing.conformance import *  # noqa: F403

pytest.importorskip("mlx.core")


@pytest.fixture(scope="module")
def backend():
    from ondevice.backends.mlx import create

    return create(exact=True)
