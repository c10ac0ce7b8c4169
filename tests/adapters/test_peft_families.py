"""PEFT's adapters on what families hold otherwise than Llama: fused and turned matrices, latents, convolutions, delta
rules, experts, routers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from safetensors.numpy import load_file

from ondevice.adapters import Adapter, LowRank, Modules, read_adapter, write_adapter
from ondevice.errors import BadFile, Unsupported
from ondevice.runtime.session import open_session
from ondevice.tensors import dense
from ondevice.testing.family import check_decoder
from tests.models import twins

from .conftest import IDS, says, stirred

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
KINDS = {  # a twin's name, what is done with it -> settings of LoraConfig
    "phi3": {"target_modules": "all-linear"},
    "phi3 dora": {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True},
    "gpt_neox": {"target_modules": ["query_key_value", "dense_4h_to_h"], "use_rslora": True},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "gpt2 dora": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    "gpt2 saved": {"target_modules": ["c_fc"], "fan_in_fan_out": True, "modules_to_save": ["attn.c_proj"]},
    "deepseek_v3": {"target_modules": "all-linear", "target_parameters": [*EXPERTS, "gate.weight"]},
    "deepseek_v2-yarn": {"target_modules": LATENT, "use_dora": True},
    "deepseek_v2": {"target_modules": ["kv_b_proj"], "rank_pattern": {"layers.1.self_attn.kv_b_proj": 2}},
    "lfm2-biases": {"target_modules": ["in_proj", "out_proj", "w1"]},
    "lfm2_moe": {"target_modules": ["in_proj"], "target_parameters": EXPERTS},
    "qwen3_next": {"target_modules": "all-linear", "target_parameters": EXPERTS},
    "qwen3_5": {"target_modules": ["in_proj_qkv", "in_proj_a", "q_proj"], "use_dora": True},
    "granite4": {"target_modules": ["input_linear", "output_linear"], "use_dora": True},
    "granitemoe-shared": {"target_modules": "all-linear", "target_parameters": [*EXPERTS, "router.weight"]},
    "gpt_oss": {"target_modules": ["q_proj"], "target_parameters": [*EXPERTS, "router.weight"]},
    "mixtral": {"target_modules": ["o_proj"], "target_parameters": [*EXPERTS, "gate.weight"]},
    "phimoe": {"target_modules": ["o_proj"], "target_parameters": EXPERTS},
    "qwen2_moe": {"target_modules": "all-linear"},
    "llama4": {"target_modules": ["q_proj", "shared_expert.down_proj"], "target_parameters": EXPERTS},
    "llama4-experts": {"target_modules": [], "target_parameters": EXPERTS[1:], "use_rslora": True},
}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(a twin's name, settings of LoraConfig) -> (the twin, PEFT's model, the folders of both)"""
    peft = pytest.importorskip("peft")

    def make(name: str, **settings):
        folder, twin = tmp_path_factory.mktemp("adapted"), twins.make(name)
        twin.save_pretrained(folder / "model")
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings)
        model = stirred(peft.get_peft_model(copy.deepcopy(twin), config), 1)
        model.save_pretrained(folder / "adapter")
        return twin, model, folder / "model", folder / "adapter"

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_says_what_peft_says_and_back(kind, adapted, created, tmp_path):
    """What PEFT saved, ours says; what ours writes of it, PEFT loads and says."""
    peft = pytest.importorskip("peft")
    twin, model, folder, adapter = adapted(kind.split()[0], **KINDS[kind])
    want = says(model)
    assert np.abs(want - says(twin)).max() > 1e-2, "the adapter does nothing"
    with open_session(folder, backend=created("cpu"), exact=True, context=13) as session:
        session.adapt([(adapter, 1.0)])
        check_decoder(session.decoder, IDS, want)
        modules = Modules(session.family, session.config)
        read = read_adapter(adapter, modules)
        assert read.parameters == sum(t.size for t in load_file(adapter / "adapter_model.safetensors").values())
        write_adapter(tmp_path / "again", read, modules)
        session.adapt([])
        check_decoder(session.decoder, IDS, says(twin))
    again = peft.PeftModel.from_pretrained(twin, tmp_path / "again").eval()
    np.testing.assert_allclose(says(again), want, rtol=0, atol=1e-5)


def test_two_weights_of_one_module_may_have_updates_of_their_own(adapted, created, tmp_path):
    """As they come from mlx-lm, which has gate and up apart: side by side in rank, and apart again when read."""
    peft = pytest.importorskip("peft")
    twin, _, folder, _ = adapted("granite4", target_modules=["q_proj"])
    draw = np.random.default_rng(0).standard_normal
    with open_session(folder, backend=created("cpu"), exact=True, context=13) as session:
        modules = Modules(session.family, session.config)
        rows, width = modules.shapes["layers.0.mlp.gate"]
        drawn = {
            f"layers.{layer}.mlp.{part}": LowRank(
                *(dense(np.float32(draw(shape) * 0.2)) for shape in ((3, width), (rows, 3))), scale
            )
            for layer, part, scale in ((0, "gate", 2.0), (0, "up", 0.5), (1, "up", 2.0))
        }
        write_adapter(tmp_path / "own", Adapter(drawn), modules)
        model = peft.PeftModel.from_pretrained(twin, tmp_path / "own").eval()
        session.adapt([(tmp_path / "own", 1.0)])
        check_decoder(session.decoder, IDS, says(model))
        read = read_adapter(tmp_path / "own", modules).updates
    assert [read[name].rank for name in drawn] == [3, 3, 3]


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        (
            "lfm2",
            {"target_modules": ["conv.conv"], "r": 36},
            r"no model\.layers\.\*\.conv\.conv\.lora_A\.weight",
        ),
        ("gpt2", {"target_modules": ["wpe"]}, r"transformer\.wpe"),
    ],
)
def test_what_cannot_be_adapted_is_named(name, settings, told, adapted, created):
    _, _, folder, adapter = adapted(name, **settings)
    with open_session(folder, backend=created("cpu"), context=13) as session, pytest.raises(BadFile, match=told):
        session.adapt([(adapter, 1.0)])


def test_what_peft_has_no_place_for_is_named(adapted, created, tmp_path):
    _, _, folder, _ = adapted("llama4", target_modules=["q_proj"])
    with open_session(folder, backend=created("cpu"), context=13) as session:
        modules = Modules(session.family, session.config)
        zeros = (dense(np.zeros(shape, np.float32)) for shape in ((2, 36), (36, 2)))
        with pytest.raises(Unsupported, match=r"no place for layers\.\*\.moe\.sideways"):
            write_adapter(tmp_path / "no", Adapter({"layers.1.moe.sideways": LowRank(*zeros, 1.0)}), modules)
    assert not (tmp_path / "no").exists()
