"""mlx-lm's adapters: what mlx-lm says with one, ours says with the same files; and what we write, mlx-lm reads."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ondevice.adapters import Modules, read_adapter, write_adapter
from ondevice.errors import BadFile, Unsupported
from ondevice.testing.family import check_decoder

from .conftest import IDS, says

ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]
KINDS = {  # name -> the model, layers, keys, kind of fine-tune
    "all": ("llama", -1, None, "lora"),
    "last": ("llama", 2, ATTENTION, "lora"),
    "dora": ("llama", 3, [*ATTENTION, "mlp.down_proj"], "dora"),
    "head": ("llama", 1, ["self_attn.o_proj", "lm_head"], "lora"),
    "embedding": ("llama", 1, ["self_attn.o_proj", "model.embed_tokens"], "lora"),
    "embedding-tied": ("tied", 1, ["self_attn.o_proj", "model.embed_tokens"], "lora"),
    "whole-paths": ("llama", 0, ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"], "lora"),
    "experts": ("moe", 2, ["self_attn.q_proj", "mlp.switch_mlp.gate_proj", "mlp.switch_mlp.down_proj"], "lora"),
    "experts-all": ("moe", 0, None, "lora"),
    "gemma3": ("gemma3", 2, ATTENTION, "lora"),
}  # fmt: skip


@pytest.fixture(scope="session")
def fine_tuned(model, tmp_path_factory):
    """name of a kind -> (the folder of a model, that of an adapter on it, logits of both by mlx-lm)"""
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    from mlx.utils import tree_flatten

    mx.set_default_device(mx.cpu)

    def make(kind: str):
        name, layers, keys, tune = KINDS[kind]
        base, folder = model(name)[1], tmp_path_factory.mktemp("mlx") / kind
        folder.mkdir()
        lora = {"rank": 3, "scale": 2.5, "dropout": 0.0} | ({"keys": keys} if keys else {})
        config = {"fine_tune_type": tune, "num_layers": layers, "lora_parameters": lora}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        mx.save_safetensors(str(folder / "adapters.safetensors"), {})
        adapted = loaded(base, folder)
        mx.random.seed(1)
        leaves = tree_flatten(adapted.parameters())
        drawn = {
            k: v + 0.2 * mx.random.normal(v.shape)
            for k, v in leaves
            if k.rpartition(".")[2] in ("lora_a", "lora_b", "m")
        }
        mx.save_safetensors(str(folder / "adapters.safetensors"), drawn)
        return base, folder, logits(loaded(base, folder)), logits(utils.load_model(base)[0])

    return make


def loaded(base, folder):
    """mlx-lm's model with an adapter."""
    utils, tuner = pytest.importorskip("mlx_lm.utils"), pytest.importorskip("mlx_lm.tuner.utils")
    return tuner.load_adapters(utils.load_model(base)[0], str(folder))


def logits(model):
    mx = pytest.importorskip("mlx.core")
    model.eval()
    return np.array(model(mx.array(IDS)).astype(mx.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_says_what_mlx_lm_says(kind, fine_tuned, opened, created, tmp_path):
    """With mlx-lm's own files, with ours of the same adapter (read by mlx-lm again), and with PEFT's format between."""
    base, folder, want, without = fine_tuned(kind)
    assert np.abs(want - without).max() > 1e-2, "the adapter does nothing"
    session = opened(base, created("cpu"))
    session.adapt([(folder, 1.0)])
    check_decoder(session.decoder, IDS, want)
    modules = Modules(session.family, session.config)
    write_adapter(tmp_path / "again", read_adapter(folder, modules), modules, "mlx")
    files = [f / "adapters.safetensors" for f in (folder, tmp_path / "again")]
    mx = pytest.importorskip("mlx.core")
    old, new = (mx.load(str(file)) for file in files)
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[key], new[key]) for key in old)
    assert np.array_equal(logits(loaded(base, tmp_path / "again")), want)
    write_adapter(tmp_path / "peft", read_adapter(folder, modules), modules, "peft")
    session.adapt([(tmp_path / "peft", 1.0)])
    check_decoder(session.decoder, IDS, want)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        ("llama", {"target_modules": ["q_proj", "k_proj"], "use_rslora": True, "layers_to_transform": [0]}),
        (
            "llama",
            {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}},
        ),
        ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
        ("moe", {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ],
)  # fmt: skip
def test_peft_to_mlx_lm(name, settings, lora, model, opened, created, tmp_path):

    adapted, folder = lora(name, **settings)
    session = opened(name, created("cpu"))
    modules = Modules(session.family, session.config)
    write_adapter(tmp_path / "mlx", read_adapter(folder, modules), modules, "mlx")
    pytest.importorskip("mlx.core").set_default_device(pytest.importorskip("mlx.core").cpu)
    assert np.abs(logits(loaded(session.path, tmp_path / "mlx")) - says(adapted)).max() < 1e-4
    write_adapter(tmp_path / "back", read_adapter(tmp_path / "mlx", modules), modules, "peft")
    session.adapt([(tmp_path / "back", 1.0)])
    check_decoder(session.decoder, IDS, says(adapted))


@pytest.mark.parametrize(
    ("name", "settings", "what"),
    [
        ("tied", {"target_modules": ["embed_tokens"]}, "does not reach the head"),
        ("tied", {"target_modules": ["lm_head"]}, "does not reach the head"),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, "no place for embed"),
        ("biased", {"target_modules": ["q_proj"], "bias": "all"}, "bias"),
    ],
)
def test_what_mlx_lm_has_no_place_for(name, settings, what, lora, opened, tmp_path):
    _, folder = lora(name, **settings)
    session = opened(name)
    modules = Modules(session.family, session.config)
    with pytest.raises(Unsupported, match=what):
        write_adapter(tmp_path / "mlx", read_adapter(folder, modules), modules, "mlx")
    assert not (tmp_path / "mlx").exists()


def test_every_mismatch_is_named(fine_tuned, opened):
    _, folder, *_ = fine_tuned("last")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["num_layers"] = 3
    config["lora_parameters"]["keys"].append("self_attn.qkv")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BadFile) as raised:
        opened("tied").adapt([(folder, 1.0)])
    for told in (
        "model.layers.0.self_attn.q_proj is a target",
        "layers.0.self_attn.v_proj",
        "the target self_attn.qkv",
    ):
        assert told in raised.value.message
    config["fine_tune_type"] = "full"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="full"):
        opened("tied").adapt([(folder, 1.0)])
