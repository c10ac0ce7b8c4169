"""The backends that are ready here, exact; and the twins, each made once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import twins

from ondevice.backends.base import Backend
from ondevice.registry import create_backend, probe_backends


@cache
def _backend(name: str) -> Backend:
    return create_backend(name, exact=True)


@pytest.fixture(params=twins.BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    probe = probe_backends()[request.param]
    if not probe.ready:
        pytest.skip(f"{request.param}: {probe.reason}")
    return _backend(request.param)


@pytest.fixture(scope="session")
def twin_folder(tmp_path_factory: pytest.TempPathFactory):
    """name -> (the twin, its folder as transformers saves it)"""
    pytest.importorskip("transformers")

    @cache
    def make(name: str) -> tuple[object, Path]:
        folder = tmp_path_factory.mktemp("twins") / name
        model = twins.make(name)
        model.save_pretrained(folder)
        return model, folder

    return make
