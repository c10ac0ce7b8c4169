"""Mutated files: refused in two lines or read, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_readers.py")


def fuzz(folder: Path, first: int, count: int) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-X", "faulthandler", str(SCRIPT), str(folder), str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + count // 20, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    refused, read = map(int, done.stdout.split())
    assert refused > count // 2 and read > count // 50, (refused, read)  # both kinds really occur


def test_mutated_files(tmp_path):
    fuzz(tmp_path / "work", 0, 2100)


@pytest.mark.slow
def test_many_more_mutated_files(tmp_path):
    fuzz(tmp_path / "work", 100_000, 40_000)
