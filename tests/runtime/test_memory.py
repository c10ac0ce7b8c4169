"""What the machine has, and what is refused before it starts to swap."""

import numpy as np
import pytest

from ondevice.errors import OnDeviceError
from ondevice.runtime import memory


def test_the_peak_grows_with_what_is_held():
    before = memory.peak_memory_bytes()
    held = np.ones(300_000_000, np.uint8)
    assert memory.peak_memory_bytes() - before > 100_000_000 or memory.peak_memory_bytes() > 300_000_000
    assert held.sum() == 300_000_000


def test_the_machine_has_some_memory():
    assert memory.memory_bytes() is None or memory.memory_bytes() > 1 << 28


def test_more_than_the_machine_has_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "memory_bytes", lambda: 8_000_000_000)
    memory.require(7_900_000_000, "model.gguf")
    with pytest.raises(OnDeviceError, match=r"model.gguf needs 140.0 GB and this machine has 8.0 GB"):
        memory.require(140_000_000_000, "model.gguf")
