"""docs/adding-a-backend.md is true: its code is the toy package, whole, and its commands work."""

from __future__ import annotations

import json
import re
import sys

import pytest

from tests.plugins.pages import Page, Ran

PAGE = Page("adding-a-backend.md", "toy_backend")


@pytest.mark.parametrize("file", PAGE.files)
def test_the_code_shown_is_the_package(file: str) -> None:
    assert PAGE.shown(file) == PAGE.held(file), f"{file} and what the page shows of it differ"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return PAGE.run(tmp_path_factory.mktemp("toy"))


def test_the_commands_of_the_page(ran: Ran) -> None:
    """Installed, listed, and green on the suite."""
    assert "toy" in ran.output and "one toy processor" in ran.output
    assert re.search(r"\d{3} passed", ran.output)


def test_a_probe_that_says_no(ran: Ran) -> None:
    code = "from ondevice.registry import create_backend; create_backend('toy')"
    done = ran.run(sys.executable, "-c", code, TOY_UNPLUGGED="1")
    assert "the toy is unplugged" in done.stderr and "unset TOY_UNPLUGGED" in done.stderr


def test_it_is_a_backend_like_ours(ran: Ran) -> None:
    code = (
        "import json; from ondevice.registry import create_backend, probe_backends;"
        "print(json.dumps([create_backend('toy', exact=True).info().device, probe_backends()['toy'].ready]))"
    )
    assert json.loads(ran.run(sys.executable, "-c", code).stdout) == ["one toy processor", True]
