"""Adapters on an open session: several at once, switched, over quantized weights; and what cannot be."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ondevice.adapters import Modules, read_adapter
from ondevice.backends.base import Step
from ondevice.errors import BadFile, OnDeviceError, Unavailable, Unsupported
from ondevice.runtime.engine import GenerateOptions
from ondevice.runtime.session import open_session
from ondevice.testing.family import check_decoder

from .conftest import IDS, says

FIRST, SECOND = {"target_modules": "all-linear"}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "r": 3}


def logits(session) -> np.ndarray:
    ops = session.backend
    return np.array(ops.numpy(session.decoder(ops.array(IDS), Step.whole(*IDS.shape))))


def greedy(session, count: int = 6) -> list[int]:
    events = session.engine.generate(IDS[0].tolist(), GenerateOptions(max_tokens=count))
    return [event.id for event in events if hasattr(event, "id")]


def test_several_at_once_with_weights(lora, model, opened, created):
    """As PEFT has them when several are active, each scaled."""
    peft = pytest.importorskip("peft")
    (_, one), (_, two) = lora("llama", 1, **FIRST), lora("llama", 2, **SECOND)
    both = peft.PeftModel.from_pretrained(_copy(model("llama")[0]), one, adapter_name="one")
    both.load_adapter(two, adapter_name="two")
    both.base_model.set_adapter(["one", "two"])
    for module in both.modules():
        if hasattr(module, "set_scale"):
            for name, weight in (("one", 0.7), ("two", -1.5)):
                if name in module.scaling:
                    module.set_scale(name, weight)
    session = opened("llama", created("cpu"))
    session.adapt([(one, 0.7), (two, -1.5)])
    check_decoder(session.decoder, IDS, says(both.eval()))


def test_weights_add_up_as_peft_adds_them(lora, model, opened, created):
    peft = pytest.importorskip("peft")
    (_, one), (_, two) = lora("llama", 1, **FIRST), lora("llama", 3, **FIRST)
    both = peft.PeftModel.from_pretrained(_copy(model("llama")[0]), one, adapter_name="one")
    both.load_adapter(two, adapter_name="two")
    both.add_weighted_adapter(["one", "two"], [0.25, 0.5], "sum", combination_type="cat")
    both.set_adapter("sum")
    session = opened("llama", created("cpu"))
    session.adapt([(one, 0.25), (two, 0.5)])
    check_decoder(session.decoder, IDS, says(both.eval()))


def _copy(model):
    import copy

    return copy.deepcopy(model)


def test_a_weight_is_a_share_of_the_change(lora, opened, created):
    """Of DoRA's too, and of whole tensors: none at 0, all at 1, and between the model is between."""
    session = opened("biased", created("cpu"))
    before = logits(session)
    _, folder = lora("biased", target_modules=["q_proj"], use_dora=True, modules_to_save=["norm"])
    session.adapt([(folder, 0.0)])
    assert np.abs(logits(session) - before).max() < 1e-5
    session.adapt([(folder, 0.5), (folder, 0.5)])
    halves = logits(session)
    session.adapt([(folder, 1.0)])
    assert np.abs(logits(session) - halves).max() < 1e-4
    assert np.abs(halves - before).max() > 1e-2


@pytest.mark.parametrize("name", ["reference", "cpu", "cuda", "mlx"])
def test_switching_forgets_what_the_old_ones_said(name, lora, opened, created):
    """Plans and cache: after a switch, the same as a session that never had another."""
    from ondevice.registry import probe_backends

    if not probe_backends()[name].ready:
        pytest.skip(f"{name} is not here")
    _, one = lora("llama", 1, **FIRST)
    _, two = lora("llama", 2, **SECOND)
    session, fresh = opened("llama", created(name)), opened("llama", created(name))
    plain = greedy(session)
    session.adapt([(one, 1.0)])
    greedy(session)
    session.adapt([(two, 1.0)])
    fresh.adapt([(two, 1.0)])
    assert greedy(session) == greedy(fresh) != plain
    session.adapt([])
    assert session.attached == () and greedy(session) == plain


@pytest.mark.parametrize("settings", [FIRST, SECOND, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}])
def test_decoding_with_an_adapter_stays_recorded(settings, lora, opened, created):
    cpu = created("cpu")
    if "compile" not in cpu.features:
        pytest.skip("there are no native kernels here")
    session = opened("llama", cpu)
    session.adapt([(lora("llama", 1, **settings)[1], 1.0)])
    greedy(session)
    assert cpu.compiled.startswith("a plan of"), cpu.compiled


def test_an_adapter_costs_no_more_calls(lora, opened, created):
    """Low ranks are added where the product is made; several adapters are one."""
    cpu = created("cpu")
    if "compile" not in cpu.features:
        pytest.skip("there are no native kernels here")
    session, calls = opened("llama", cpu), []
    folders = [lora("llama", seed, **FIRST)[1] for seed in (1, 3)]
    for count in range(3):
        session.adapt([(folder, 1.0) for folder in folders[:count]])
        greedy(session)
        calls.append(cpu.compiled)
    assert calls[0] == calls[1] == calls[2] and calls[0].startswith("a plan of"), calls


@pytest.mark.parametrize("backend_name", ["cpu", "cuda"])
def test_over_quantized_weights(backend_name, lora, model, created, tmp_path):
    """As PEFT over what the quantized weights stand for."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from ondevice.tools.quantize import Options, quantize

    quantize(model("wide")[1], tmp_path / "4bit", Options(method="rtn", bits=4, group_size=32))
    _, folder = lora("wide", target_modules=["q_proj", "up_proj"], use_dora=True)
    with open_session(tmp_path / "4bit", backend=created(backend_name), exact=True) as session:
        values = {n: session.backend.numpy(session.backend.dequantize(w)) for n, w in session.weights.items()}
        shutil.copytree(model("wide")[1], tmp_path / "dense")
        modules = Modules(session.family, session.config)
        named = {
            modules.paths[place] + ".weight": values[place.name] for place in modules.paths if place.name in values
        }
        save_file({k: np.ascontiguousarray(v) for k, v in named.items()}, tmp_path / "dense" / "model.safetensors")
        dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        session.adapt([(folder, 1.0)])
        check_decoder(session.decoder, IDS, says(peft.PeftModel.from_pretrained(dense, folder).eval()))


# ------------------------------------------------------------------------------------------------ what cannot be


@pytest.fixture
def broken(lora, tmp_path):
    """A copy of an adapter, and how to change its config or its tensors."""
    folder = tmp_path / "adapter"
    shutil.copytree(lora("llama", target_modules=["q_proj", "v_proj"])[1], folder)

    def change(config=lambda c: {}, tensors=lambda t: t):
        path = folder / "adapter_config.json"
        found = json.loads(path.read_text())
        path.write_text(json.dumps(found | config(found)))
        weights = folder / "adapter_model.safetensors"
        save_file(tensors(load_file(weights)), weights)
        return folder

    return change


def renamed(old: str, new: str):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(part: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def more_targets(name: str):
    return lambda config: {"target_modules": [*config["target_modules"], name]}


def same(given: dict) -> dict:
    return given


EXTRA = {"base_model.model.model.extra.weight": np.ones(3, np.float32)}
WRONG = {  # what is done to config and tensors -> what must be told
    "other rank": (lambda c: {"r": 5}, same, ["down is [4, 36], not [5, 36] (* = 0-2)", "up is [48, 4], not [48, 5]"]),
    "no such module": (
        same, renamed("layers.2.self_attn.v_proj", "layers.7.self_attn.v_proj"),
        ["there is no model.layers.7.self_attn.v_proj.lora_A", "layers.2.self_attn.v_proj is a target"],
    ),
    "another target": (more_targets("k_proj"), same, ["k_proj is a target"]),
    "unknown target": (more_targets("c_attn"), same, ["the target c_attn"]),
    "half an update": (same, without("1.self_attn.q_proj.lora_B"), ["layers.1.self_attn.q_proj lacks up"]),
    "no magnitude": (lambda c: {"use_dora": True}, same, ["lacks magnitude"]),
    "unknown tensor": (same, lambda t: t | EXTRA, ["there is no model.extra.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_every_mismatch_is_named_at_once(what, broken, opened):
    config, tensors, told = WRONG[what]
    session = opened("llama")
    before = logits(session)
    with pytest.raises(BadFile) as raised:
        session.adapt([(broken(config, tensors), 1.0)])
    assert all(part in raised.value.message for part in told), raised.value.message
    assert session.attached == () and np.array_equal(logits(session), before)


def test_an_adapter_of_another_model_names_them_all(lora, opened):
    _, folder = lora("llama", target_modules="all-linear")
    with pytest.raises(BadFile) as raised:
        opened("gemma3").adapt([(lora("wide", target_modules=["q_proj", "down_proj"])[1], 1.0)])
    for part in ("q_proj: down is [4, 64], not [4, 36]", "down_proj: down is [4, 96], not [4, 40]", "(* = 0-2)"):
        assert part in raised.value.message
    assert read_adapter(folder, Modules(opened("llama").family, opened("llama").config)).parameters > 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"peft_type": "IA3"}, "type 'IA3'"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_kinds_that_are_not_read(change, told, broken, opened):
    with pytest.raises(Unsupported, match=told):
        opened("llama").adapt([(broken(lambda c: change), 1.0)])


@pytest.mark.parametrize(
    "change",
    [
        {"r": 0}, {"r": "8"}, {"lora_alpha": None, "r": -3}, {"lora_alpha": "x"}, {"target_modules": "q_proj("},
        {"target_modules": [3]}, {"rank_pattern": {"q_proj": 0}}, {"rank_pattern": [1]}, {"use_dora": "yes"},
        {"layers_to_transform": ["a"]}, {"rank_pattern": {"(": 4}}, {"alpha_pattern": {"q_proj)": 4}},
        {"modules_to_save": ["lm_head("]}, {"layers_pattern": ["("], "layers_to_transform": [0]},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(change, broken, opened):
    with pytest.raises(BadFile, match=r"adapter_config\.json"):
        opened("llama").adapt([(broken(lambda c: change), 1.0)])


def test_files_that_are_no_adapter(broken, opened, tmp_path, model):
    session, folder = opened("llama"), broken()
    with pytest.raises(Unavailable, match="no adapter folder"):
        session.adapt([(tmp_path / "nothing", 1.0)])
    with pytest.raises(BadFile, match="no adapter"):
        session.adapt([(model("llama")[1], 1.0)])
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadFile, match="damaged"):
        session.adapt([(folder, 1.0)])
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(BadFile, match="pickle"):
        session.adapt([(folder, 1.0)])
    (folder / "adapter_model.bin").rename(weights)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(OnDeviceError, match="damaged"):
        session.adapt([(folder, 1.0)])
