import pytest
from ondevice_toy import create

from ondevice.testing.conformance import *  # noqa: F403


@pytest.fixture(scope="module")
def backend():
    return create(exact=True)
