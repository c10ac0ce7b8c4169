"""What long work keeps on disk, to go on with after a kill."""

import numpy as np
import pytest

from ondevice.tools.work import Work


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_what_a_power_cut_has_spoilt_counts_as_not_there(damage, tmp_path):
    work = Work(tmp_path / "out", {"of": 1})
    work.keep("found", {"a": np.arange(1000)})
    assert np.array_equal(work.arrays("found")["a"], np.arange(1000))
    file = work.path / "found.npz"
    octets = bytearray(file.read_bytes())
    octets[500] ^= 1
    file.write_bytes(octets if damage == "changed" else octets[:500])
    assert work.arrays("found") is None
