"""Every family beside transformers, on every backend that is ready: at once, token by token, in pieces, ragged."""

from __future__ import annotations

import pytest
import twins

from ondevice.testing.family import check_family


@pytest.mark.parametrize("name", twins.TWINS)
def test_logits_are_those_of_transformers(name, backend, twin_folder):
    twin, folder = twin_folder(name)
    check_family(folder, twin, backend)
