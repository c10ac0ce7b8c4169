"""The same twins as GGUF files: what llama.cpp's converter rearranges comes back to where it was."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.models.families import family_of
from ondevice.models.parameters import Parameters
from ondevice.schemes import to_float
from ondevice.tensors import Blocks
from ondevice.testing.family import check_family
from tests.models import gguf_twins, twins

LLAMA3 = twins.LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
GEMMA = {"num_hidden_layers": 7, "query_pre_attn_scalar": 8, "sliding_window": 3}
EVEN_YARN = twins.YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}  # llama.cpp knows one for both
FILES = {
    "llama": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-linear": ("llama-linear", {}),
    "llama3": ("llama-rope3", {"rope_parameters": LLAMA3}),
    "llama-biases": ("llama-biases", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", GEMMA | {"sliding_window_pattern": 6}),
    "gemma3-linear": ("gemma3-full", {"query_pre_attn_scalar": 8, "final_logit_softcapping": None, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    "qwen3_moe": ("qwen3_moe", {}),
    "mistral": ("mistral-full", {"head_dim": 6}),
    "qwen2": ("qwen2", {}),
    "phi3": ("phi3", {}),
    "phi3-long": ("phi3-long", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 8}),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo2-third", {}),
    "granite": ("granite-biases", {}),
    "stablelm": ("stablelm", {}),
    "stablelm-parallel": ("stablelm-parallel", {}),
    "stablelm-norms": ("stablelm-norms", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "gpt2": ("gpt2", {"activation_function": "gelu_new"}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-serial": ("gpt_neox-serial", {"attention_bias": True}),
    "cohere": ("cohere", {}),
    "cohere-norms": ("cohere-norms", {}),
    "cohere2": ("cohere2", {}),
    "glm4": ("glm4", {}),
    "lfm2": ("lfm2", {}),
    "lfm2-biases": ("lfm2-biases", {}),
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "olmoe": ("olmoe", {}),
    "gpt_oss": ("gpt_oss-yarn", {}),
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2-yarn": ("deepseek_v2-yarn", {"rope_parameters": EVEN_YARN}),
    "deepseek_v3": ("deepseek_v3", {}),
    "arcee": ("arcee-biases", {}),
    "seed_oss": ("seed_oss", {}),
    "hunyuan": ("hunyuan-plain", {}),
    "exaone4": ("exaone4", {"rope_parameters": LLAMA3}),
    "exaone4-full": ("exaone4-full", {}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {}),
    "ernie4_5_moe-bare": ("ernie4_5_moe", {"moe_num_shared_experts": 0, "moe_layer_start_index": 0}),
    "olmo": ("olmo", {}),
    "nemotron": ("nemotron", {}),
    "nemotron-biases": ("nemotron-biases", {"tie_word_embeddings": False}),
    "phi": ("phi", {}),
    "phimoe": ("phimoe", {"router_jitter_noise": 0.01, "attention_bias": True, "lm_head_bias": True}),
    "glm4_moe": ("glm4_moe", {}),
    "glm4_moe-biases": ("glm4_moe", {"attention_bias": True, "use_qk_norm": False, "norm_topk_prob": False}),
    "lfm2_moe": ("lfm2_moe", {"routed_scaling_factor": 1.0}),
    "qwen3_5": ("qwen3_5", {}),
    "qwen3_5-wide": ("qwen3_5-wide", {}),
    "qwen3_5_moe": ("qwen3_5_moe", {}),
    "qwen3_next": ("qwen3_next", {"tie_word_embeddings": True}),
    "llama4": ("llama4", {"attention_chunk_size": 8192, "floor_scale": 8192}),
    "ministral3": ("ministral3", {}),
    "granitemoe": ("granitemoe", {}),
    "granitemoe-shared": ("granitemoe-shared", {}),
}  # fmt: skip


FIRST = ("llama", "gemma3", "qwen3_moe")
PAIRS = [  # what a file is read as does not depend on the backend
    pytest.param(b, name, marks=[] if b == "reference" or name in FIRST else [pytest.mark.slow])
    for b in twins.BACKENDS
    for name in FILES
]


@pytest.mark.parametrize(("backend", "name"), PAIRS, indirect=["backend"])
def test_logits_of_a_gguf_are_those_of_the_twin(name, backend, tmp_path):
    base, fields = FILES[name]
    twin = twins.make(base, **fields)
    gguf_twins.write(tmp_path / "twin.gguf", twin)
    check_family(tmp_path / "twin.gguf", twin, backend)


class Guessing(gguf.GGUFWriter):
    """With a layer behind the last one that guesses a token further ahead."""

    def add_block_count(self, length):
        super().add_block_count(length + 1)
        self.add_nextn_predict_layers(1)
        for name in ("nextn.eh_proj", "attn_norm"):
            self.add_tensor(f"blk.{length}.{name}.weight", np.ones((4, 4), np.float32))


class Together(gguf.GGUFWriter):
    """With gate and up of the experts in one tensor."""

    def add_tensor(self, name, values, raw_dtype=None):
        if "ffn_gate_exps" in name:
            self.gate = values
        elif "ffn_up_exps" in name:
            super().add_tensor(name.replace("up", "gate_up"), np.concatenate([self.gate, values], axis=1))
        else:
            super().add_tensor(name, values, raw_dtype=raw_dtype)


class Seeing(gguf.GGUFWriter):
    """The part that writes text of a model that also sees."""

    def __init__(self, path, arch):
        super().__init__(path, arch + "vl")
        self.add_rope_dimension_sections([2, 1, 1, 0])


@pytest.mark.parametrize(("name", "writer"), [("glm4_moe", Guessing), ("qwen3_moe", Together), ("qwen3", Seeing)])
def test_other_forms_of_a_file(name, writer, tmp_path):
    twin = twins.make(name)
    gguf_twins.write(tmp_path / "twin.gguf", twin, writer_class=writer)
    check_family(tmp_path / "twin.gguf", twin)


def test_blocks_of_value_heads_move_whole(tmp_path):
    """llama.cpp's order of value heads parts the columns of a map: blocks of a head's width go to their places."""
    sizes = {"linear_value_head_dim": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2}
    twin = twins.make("qwen3_5", **sizes)
    gguf_twins.write(tmp_path / "twin.gguf", twin, {"ssm_out.weight": "Q8_0"})
    with open_checkpoint(tmp_path / "twin.gguf") as checkpoint:
        family, hf = family_of(checkpoint)
        parameters = Parameters(family, family.config(hf), checkpoint)
        got = parameters["layers.0.delta.out"]
    wanted = twins.saved(twin)["model.layers.0.linear_attn.out_proj.weight"]
    kind = gguf.GGMLQuantizationType.Q8_0
    rounded = gguf.quants.dequantize(gguf.quants.quantize(wanted, kind), kind)
    assert got.format == Blocks("Q8_0") and np.array_equal(to_float(got), rounded)
