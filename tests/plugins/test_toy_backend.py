"""docs/adding-a-backend.md is true: its code is the toy package, whole, and its commands work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOY = HERE / "toy_backend"
DOC = HERE.parents[1] / "docs" / "adding-a-backend.md"
BLOCKS = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```", DOC.read_text(), re.M | re.S)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize(
    "path", sorted(str(p.relative_to(TOY)) for p in TOY.rglob("*") if p.suffix in (".py", ".toml"))
)
def test_the_code_shown_is_the_package(path: str) -> None:
    shown = "".join(code for _, name, code in BLOCKS if name == path)
    assert lines(shown) == lines((TOY / path).read_text()), f"{path} and what the page shows of it differ"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], str]:
    """A copy of the package, the environment in which the page's commands ran, and what they printed."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("toy")
    copy, site = folder / "ondevice-toy", folder / "site"
    shutil.copytree(TOY, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PIP_TARGET": str(site),  # into a folder of its own, from what is here
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PYTHONPATH": str(site),
    }
    commands = "".join(code for language, _, code in BLOCKS if language == "sh")
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return copy, environment, done.stdout


def test_the_commands_of_the_page(installed) -> None:
    """Installed, listed, and green on the suite."""
    output = installed[2]
    assert "toy" in output and "one toy processor" in output
    assert re.search(r"\d{3} passed", output)


def test_a_probe_that_says_no(installed) -> None:
    _, environment, _ = installed
    code = "from ondevice.registry import create_backend; create_backend('toy')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"TOY_UNPLUGGED": "1"}, capture_output=True, text=True
    )
    assert "the toy is unplugged" in done.stderr and "unset TOY_UNPLUGGED" in done.stderr


def test_it_is_a_backend_like_ours(installed) -> None:
    _, environment, _ = installed
    code = (
        "import json; from ondevice.registry import create_backend, probe_backends;"
        "print(json.dumps([create_backend('toy', exact=True).info().device, probe_backends()['toy'].ready]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["one toy processor", True]
