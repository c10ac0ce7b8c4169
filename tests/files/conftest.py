from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.files.small_models import write_gguf, write_hf


@pytest.fixture
def gguf_file(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path / "tiny.gguf"
    return path, write_gguf(path)


@pytest.fixture(params=[1, 2], ids=["one file", "shards"])
def hf_folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path / "model"
    return folder, write_hf(folder, request.param)
