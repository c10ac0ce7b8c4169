"""The suite is worth what it rejects: every broken twin must fail, with a reason, in the area that it is broken in."""

from __future__ import annotations

import pytest

from ondevice.backends.reference import NumpyKernels
from ondevice.testing.suite import CASES, run
from tests.conformance.broken_twins import TWINS
from tests.conformance.broken_twins.contract import Bursting


@pytest.mark.parametrize("name", TWINS)
def test_rejected(name: str) -> None:
    area, make = TWINS[name]
    failures = run(make(), lambda case: case.name.startswith(f"{area}."), first=True)
    assert failures, f"the {area} cases accept {name}"
    assert str(failures[0].error), f"{failures[0].case.name} rejects {name} without a word"


def test_a_right_burst_is_accepted() -> None:
    assert not run(Bursting(NumpyKernels()), lambda case: case.name.startswith("compiled."))


@pytest.mark.slow
def test_every_check_rejects_somebody() -> None:
    """A check that no twin fails has not been seen to work."""
    useful = set()
    for area, make in TWINS.values():
        failures = run(make(), lambda case, area=area: case.name.startswith(f"{area}."))
        useful |= {failure.case.check for failure in failures}
    assert not {case.check.__name__ for case in CASES if case.check not in useful}
