"""Pages of docs/ whose code is a package under tests/plugins: what they show, and their commands, run on a copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def code_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@dataclass(frozen=True)
class Ran:
    """A copy of the package, the environment in which the page's commands ran, and what they printed."""

    copy: Path
    environment: dict[str, str]
    output: str = ""

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess:
        """One more command, in the copy."""
        return subprocess.run(
            command, cwd=self.copy, env=self.environment | environment, capture_output=True, text=True, timeout=300
        )


class Page:
    """docs/NAME and the package that it shows."""

    def __init__(self, name: str, package: str):
        self.text = (HERE.parents[1] / "docs" / name).read_text(encoding="utf-8")
        self.package = HERE / package

    @cached_property
    def blocks(self) -> list[tuple[str, str, str]]:
        """Language, file (or nothing) and code of each."""
        return re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```", self.text, re.M | re.S)

    @property
    def files(self) -> list[str]:
        """The package's files, relative to it."""
        found = (p for p in self.package.rglob("*") if p.suffix in (".py", ".toml"))
        return sorted(str(p.relative_to(self.package)) for p in found)

    def shown(self, file: str) -> list[str]:
        return code_lines("".join(code for _, name, code in self.blocks if name == file))

    def held(self, file: str) -> list[str]:
        return code_lines((self.package / file).read_text(encoding="utf-8"))

    def run(self, folder: Path) -> Ran:
        """The page's commands in a copy of the package; they install into a folder of its own, from what is here."""
        pytest.importorskip("setuptools")
        copy, site = folder / "package", folder / "site"
        shutil.copytree(self.package, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PIP_TARGET": str(site),
            "PIP_NO_DEPS": "1",
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PYTHONPATH": str(site),
        }
        commands = "".join(code for language, _, code in self.blocks if language == "sh")
        ran = Ran(copy, environment)
        done = ran.run("bash", "-ec", commands)
        assert done.returncode == 0, done.stdout + done.stderr
        return replace(ran, output=done.stdout)
