"""The conformance suite's face for pytest. A backend's whole test file:

    import pytest
    from ondevice.testing.conformance import *
    from my_package import create

    @pytest.fixture(scope="module")
    def backend():
        return create(exact=True)

Cases for features that the backend does not declare are skipped, by the feature's word. A backend that also has a mode
of lower precision returns it from a fixture `default_backend`: then everything about weights and compilation is
checked again, more loosely.
"""

from __future__ import annotations

import pytest

from ..backends.base import Backend
from . import cases  # noqa: F401  (registers them)
from .suite import CASES, Case, run

__all__ = ["default_backend", "reference", "test_conformance", "test_default_mode"]


@pytest.fixture(scope="session")
def reference() -> Backend:
    from ..backends.reference import create

    return create()


@pytest.fixture(scope="session")
def default_backend() -> Backend | None:
    """To be overridden where the default mode is less than exact."""
    return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conformance(case: Case, backend: Backend, reference: Backend) -> None:
    if not case.serves(backend):
        pytest.skip(f"{backend.name} does not declare {case.feature!r}")
    case(backend, reference)


def test_default_mode(default_backend: Backend | None) -> None:
    if default_backend is None:
        pytest.skip("this backend has one mode")
    failures = run(default_backend, lambda case: case.name.startswith(("weights.", "compiled.")))
    assert not failures, "\n".join(map(str, failures))
