"""The same twins as GGUF files: what llama.cpp's converter rearranges comes back to where it was."""

from __future__ import annotations

import pytest

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
