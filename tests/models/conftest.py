"""The backends that are ready here, exact; and the twins, each made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

from ondevice.backends.base import Backend
from ondevice.registry import create_backend, probe_backends
from tests.models import twins


@pytest.fixture(scope="session")
def created() -> Callable[[str], Backend]:
    """name -> the backend, exact, made when first asked for"""
    return cache(partial(create_backend, exact=True))


@pytest.fixture(params=twins.BACKENDS)
def backend(request: pytest.FixtureRequest, created: Callable[[str], Backend]) -> Backend:
    probe = probe_backends()[request.param]
    if not probe.ready:
        pytest.skip(f"{request.param}: {probe.reason}")
    return created(request.param)


@pytest.fixture(scope="session")
def twin_folder(tmp_path_factory: pytest.TempPathFactory):
    """name -> (the twin, its folder as transformers saves it)"""

    @cache
    def make(name: str) -> tuple[object, Path]:
        folder = tmp_path_factory.mktemp("twins") / name
        model = twins.make(name)
        model.save_pretrained(folder)
        return model, folder

    return make
