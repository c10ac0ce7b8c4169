"""PEFT's adapters: what PEFT's model says with one, ours says with the same files."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from ondevice.adapters import Modules, read_adapter, write_adapter
from ondevice.testing.family import check_decoder

from .conftest import IDS, says

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS = {  # name -> the model, what differs from rank 4 and alpha 8
    "lora": ("llama", {"target_modules": "all-linear"}),
    "rslora": ("llama", {"target_modules": ATTENTION, "use_rslora": True}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "dora-biases": ("biased", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "head": ("llama", {"target_modules": ["lm_head", "v_proj"]}),
    "head-dora": ("tied", {"target_modules": ["lm_head"], "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "o_proj"]}),
    "embedding-dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embedding-tied": ("tied", {"target_modules": ["embed_tokens", "up_proj"]}),
    "ranks": (
        "llama",
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 6},
            "alpha_pattern": {"v_proj": 3, r".*\.2\.self_attn\.o_proj": 1},
        },
    ),
    "ranks-rslora": ("llama", {"target_modules": ATTENTION, "rank_pattern": {"o_proj": 9}, "use_rslora": True}),
    "expression": ("llama", {"target_modules": r"model\.layers\.[01]\..*(q|gate)_proj"}),
    "some-layers": ("llama", {"target_modules": ATTENTION, "layers_to_transform": [0, 2]}),
    "one-layer": ("llama", {"target_modules": ATTENTION, "layers_to_transform": 1, "layers_pattern": "layers"}),
    "excluded": (
        "llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj", "model.layers.0.mlp.up_proj"]}
    ),
    "biases": ("biased", {"target_modules": ["q_proj"], "bias": "all"}),
    "own-biases": ("biased", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "saved-tied": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved-embedding": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved-both": (
        "tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "both": ("tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "qwen3": ("qwen3", {"target_modules": "all-linear", "use_dora": True}),
    "gemma3": ("gemma3", {"target_modules": "all-linear"}),
    "experts": (
        "moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "experts-all-linear": ("moe", {"target_modules": "all-linear"}),
    "experts-down": ("moe", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
    "experts-ranks": (
        "moe",
        {
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"],
            "rank_pattern": {"experts.gate_up_proj": 3},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_says_what_peft_says(kind, lora, model, opened, created):
    name, settings = KINDS[kind]
    adapted, folder = lora(name, **settings)
    want = says(adapted)
    assert np.abs(want - says(model(name)[0])).max() > 1e-2, "the adapter does nothing"
    session = opened(name, created("cpu"))
    session.adapt([(folder, 1.0)])
    check_decoder(session.decoder, IDS, want)


@pytest.mark.parametrize("kind", ["dora-biases", "embedding-dora", "saved-tied"])
def test_says_it_on_every_backend(kind, lora, opened, backend):
    name, settings = KINDS[kind]
    adapted, folder = lora(name, **settings)
    session = opened(name, backend)
    session.adapt([(folder, 1.0)])
    check_decoder(session.decoder, IDS, says(adapted))


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_written_again_it_is_the_same(kind, lora, opened, created, tmp_path):
    """To the bit; PEFT loads it and says the same."""
    peft = pytest.importorskip("peft")
    name, settings = KINDS[kind]
    adapted, folder = lora(name, **settings)
    session = opened(name, created("cpu"))
    modules = Modules(session.family, session.config)
    write_adapter(tmp_path / "again", read_adapter(folder, modules), modules)
    old, new = tensors(folder), tensors(tmp_path / "again")
    old = {k: v for k, v in old.items() if not k.endswith("base_layer.weight")}  # an embedding's copy
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[key], new[key]) for key in old)
    again = peft.PeftModel.from_pretrained(transformers_model(session.path), tmp_path / "again").eval()
    assert np.abs(says(again) - says(adapted)).max() < 1e-5


def transformers_model(folder):
    return pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(folder).eval()
