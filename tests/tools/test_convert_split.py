"""Models that come as several GGUF files: read as one, converted as one."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint, verify
from ondevice.errors import BadFile
from ondevice.registry import create_backend
from ondevice.testing.family import check_family
from ondevice.tools import convert as tool
from ondevice.tools.convert import planning
from tests.models import gguf_twins, twins


@pytest.fixture
def split(tmp_path):
    """A twin in parts of ten tensors, and whole."""
    twin = twins.make("qwen3")
    gguf_twins.write(tmp_path / "whole.gguf", twin)
    folder = tmp_path / "split"
    folder.mkdir()
    gguf_twins.write(
        folder / "twin.gguf", twin,
        writer_class=lambda path, arch: gguf.GGUFWriter(path, arch, split_max_tensors=10),
    )  # fmt: skip
    return tmp_path / "whole.gguf", folder, twin


def test_every_part_stands_for_the_whole(split, tmp_path, monkeypatch):
    whole, folder, twin = split
    parts = sorted(folder.iterdir())
    assert len(parts) > 2 and parts[0].name.startswith("twin-00001-of-0000")
    one = open_checkpoint(whole)
    for path in (*parts, folder):
        with open_checkpoint(path) as model:
            assert set(model.names) == set(one.names) and model.nbytes == one.nbytes
            assert all(np.array_equal(model[n].parts["weight"], one[n].parts["weight"]) for n in one.names)
    check_family(parts[1], twin, create_backend("reference", exact=True))
    monkeypatch.setattr(planning, "side_files", lambda checkpoint: {})
    with open_checkpoint(parts[0]) as model:
        tool.convert(tool.plan(model), tmp_path / "out")
    assert verify(tmp_path / "out").nbytes == one.nbytes


def test_parts_that_are_missing_or_misplaced_are_named(split, tmp_path):
    _, folder, _ = split
    parts = sorted(folder.iterdir())
    last = parts[-1].read_bytes()
    parts[-1].write_bytes(parts[1].read_bytes())
    with pytest.raises(BadFile, match=f"part {len(parts)} of {len(parts)} does not belong to it"):
        open_checkpoint(folder)
    parts[-1].unlink()
    with pytest.raises(BadFile, match=f"{parts[-1].name} is not there"):
        open_checkpoint(parts[0])
    parts[-1].write_bytes(last)
    parts[1].rename(folder / "other.gguf")
    with pytest.raises(BadFile, match="not called so"):
        open_checkpoint(folder / "other.gguf")
