"""What is written of every family is what transformers reads: no tensor missing or left over, and the same logits."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.models.ropes import rope
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


YARN = {  # gpt-oss's own
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": False, "original_max_position_embeddings": 4096,
}  # fmt: skip
MEMORY = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}  # which mlx-lm's kernels want
OTHERWISE = {  # what mlx-lm does as transformers does only so
    "gpt_oss": {"num_hidden_layers": 4, "rope_parameters": YARN | {"truncate": True}},
    "gpt2": {"activation_function": "gelu_new"},
    "deepseek_v3": {"moe_intermediate_size": 32, "head_dim": 4},
    "glm4_moe": {"moe_intermediate_size": 32},
    "qwen3_moe": {"moe_intermediate_size": 32},
    "qwen3_next": MEMORY | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
}


MLX = [
    "deepseek_v3", "gpt_oss", "granitemoe", "gpt2", "mixtral", "granite", "stablelm", "glm4", "lfm2", "qwen3_next",
    "qwen3_moe", "glm4_moe", "nemotron-biases",
]  # fmt: skip


@pytest.mark.parametrize("name", MLX)
def test_mlx_lm_reads_what_is_quantized(name, tmp_path):
    """Though config.json is as transformers 5 writes it, whose keys mlx-lm does not all know."""
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    sizes = {"hidden_size": 96, "intermediate_size": 64, "head_dim": 16} | OTHERWISE.get(name, {})
    twins.make(name, **sizes).save_pretrained(tmp_path / "original")
    quantize(tmp_path / "original", tmp_path / "quantized", Options(bits=8, group_size=32, method="rtn"))
    model, _ = utils.load_model(tmp_path / "quantized")
    check_family(tmp_path / "quantized", lambda ids: np.array(model(mx.array(ids)).astype(mx.float32)))


def test_mlx_lm_turns_gpt_oss_otherwise():
    """Its yarn knows no `truncate`, which gpt-oss's config has: where transformers and we agree, not mlx-lm."""
    utils = pytest.importorskip("mlx_lm.models.rope_utils")
    hf = {"head_dim": 64, "max_position_embeddings": 131_072, "rope_parameters": YARN}
    theirs = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](transformers.GptOssConfig(**hf), "cpu")[0]
    for truncate, agrees in ((True, True), (False, False)):
        rule = YARN | {"truncate": truncate}
        ours = rope(hf | {"rope_parameters": rule}, 64).frequencies()[0]
        mlx = 1 / np.array(utils.initialize_rope(64, 150_000, False, rule)._freqs)
        assert np.allclose(ours, mlx, rtol=1e-4) == agrees
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)
