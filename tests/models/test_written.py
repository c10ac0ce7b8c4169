"""What is written of every family is what transformers reads: no tensor missing or left over, and the same logits."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.testing.family import TINY, check_family, logits_of
from ondevice.tools.convert import convert, plan_hf
from ondevice.tools.quantize import Options, quantize
from tests.models import twins

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", twins.TWINS)
def test_transformers_reads_what_is_written(name, twin_folder, tmp_path):
    twin, folder = twin_folder(name)
    with open_checkpoint(folder) as checkpoint:
        convert(plan_hf(checkpoint), tmp_path / "written")
    read, found = type(twin).from_pretrained(tmp_path / "written", output_loading_info=True)
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    ids = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 9)).astype(np.int32)
    np.testing.assert_allclose(logits_of(read.eval(), ids), logits_of(twin, ids), rtol=0, atol=1e-5)


OTHERWISE = {  # what mlx-lm does as transformers does only so
    "gpt2": {"activation_function": "gelu_new"},
    "deepseek_v3": {"moe_intermediate_size": 32, "head_dim": 4},
}


@pytest.mark.parametrize("name", ["deepseek_v3", "granitemoe", "gpt2", "mixtral"])
def test_mlx_lm_reads_what_is_quantized(name, tmp_path):
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    sizes = {"hidden_size": 96, "intermediate_size": 64, "head_dim": 16} | OTHERWISE.get(name, {})
    twins.make(name, **sizes).save_pretrained(tmp_path / "original")
    place = tmp_path / "original" / "config.json"
    place.write_text(json.dumps(twins.published(json.loads(place.read_text())) | {"n_ctx": 29}))
    quantize(tmp_path / "original", tmp_path / "quantized", Options(bits=8, group_size=32, method="rtn"))
    model, _ = utils.load_model(tmp_path / "quantized")
    check_family(tmp_path / "quantized", lambda ids: np.array(model(mx.array(ids)).astype(mx.float32)))
