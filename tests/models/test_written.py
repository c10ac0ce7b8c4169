"""What is written of every family is what transformers reads: no tensor missing or left over, and the same logits."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.errors import Unsupported
from ondevice.testing.family import TINY, logits_of
from ondevice.tools.convert import convert, plan_hf
from tests.models import twins

transformers = pytest.importorskip("transformers")


UNWRITTEN = ("cohere-norms", "stablelm-norms", "qwen3_next", "qwen3_next-some")  # which are said to have no place


@pytest.mark.parametrize("name", [name for name in twins.TWINS if name not in UNWRITTEN])
def test_transformers_reads_what_is_written(name, twin_folder, tmp_path):
    twin, folder = twin_folder(name)
    with open_checkpoint(folder) as checkpoint:
        convert(plan_hf(checkpoint), tmp_path / "written")
    read, found = type(twin).from_pretrained(tmp_path / "written", output_loading_info=True)
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    ids = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 9)).astype(np.int32)
    np.testing.assert_allclose(logits_of(read.eval(), ids), logits_of(twin, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", UNWRITTEN)
def test_what_has_no_place_is_said(name, twin_folder, tmp_path):
    with open_checkpoint(twin_folder(name)[1]) as checkpoint, pytest.raises(Unsupported, match="no place for layers"):
        convert(plan_hf(checkpoint), tmp_path / "written")
    assert not (tmp_path / "written").exists()
