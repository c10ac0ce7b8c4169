"""Fused models: what base and adapter say together, in transformers too; and no adapter that is erased in silence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ondevice.errors import BadOption, OnDeviceError
from ondevice.models.decoder import Decoder
from ondevice.runtime.session import open_session
from ondevice.schemes import to_float
from ondevice.testing.family import check_decoder
from ondevice.tools.fuse import Fused, Options, drift, fuse

from .conftest import IDS, says

KINDS = {
    "lora": ("llama", {"target_modules": "all-linear"}),
    "dora-biases": ("biased", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding-dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tied-embedding": ("tied", {"target_modules": ["embed_tokens"]}),
    "tied-head": ("tied", {"target_modules": ["lm_head"], "use_dora": True}),
    "tied-saved": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "biases": ("biased", {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["norm"]}),
    "experts": (
        "moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "gemma3": ("gemma3", {"target_modules": "all-linear"}),
}


def fused(session, dest, text, **options) -> Fused:
    *_, result = fuse(session, dest, Options(text=text, tokens=32, **options))
    return result


@pytest.fixture(autouse=True)
def without_tokenizer(monkeypatch):
    """The twins have none: what is measured are fixed ids."""
    monkeypatch.setattr("ondevice.tools.fuse.fusing.samples", lambda *rest: iter([IDS]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_model_says_what_both_said(kind, lora, opened, created, tmp_path):
    transformers = pytest.importorskip("transformers")
    name, settings = KINDS[kind]
    adapted, folder = lora(name, **settings)
    session = opened(name, created("cpu"))
    session.adapt([(folder, 1.0)])
    result = fused(session, tmp_path / "fused", None)
    assert result.untied == (kind in ("tied-embedding", "tied-head", "tied-saved"))
    assert result.drift.mean < 1e-6 < 1e-3 < result.effect.mean
    want = says(adapted)
    check_decoder(opened(tmp_path / "fused", created("cpu")).decoder, IDS, want)
    if name != "moe":
        whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused").eval()
        assert np.abs(says(whole) - want).max() < 1e-4


def test_the_base_stays_as_it_was(lora, opened, created, tmp_path):
    _, folder = lora("llama", target_modules=["q_proj"])
    session = opened("llama", created("cpu"))
    session.adapt([(folder, 0.5)])
    fused(session, tmp_path / "fused", None)
    base, made = session.parameters, opened(tmp_path / "fused").parameters
    for name in base:
        same = np.array_equal(to_float(base[name]), to_float(made[name]))
        assert same == (not name.endswith("attn.q")), name


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    """(bits, group) -> the folder of a tiny model in so many bits"""
    from ondevice.tools.quantize import Options as Quantization
    from ondevice.tools.quantize import quantize

    def make(bits: int, group: int = 32):
        dest = tmp_path_factory.mktemp("quantized") / f"{bits}-{group}"
        quantize(model("wide")[1], dest, Quantization(method="rtn", bits=bits, group_size=group))
        return dest

    return make


def adapter(lora, strength: float):
    return lora("wide", target_modules=["q_proj", "v_proj", "up_proj"])[1], strength


def test_a_strong_adapter_survives_in_the_same_bits(lora, quantized, opened, created, tmp_path):
    session = opened(quantized(8), created("cpu"))
    session.adapt([adapter(lora, 1.0)])
    result = fused(session, tmp_path / "fused", None)
    assert len(result.tried) == 1 and result.tried[0].share < 0.05
    made = open_session(tmp_path / "fused", backend=created("cpu"), exact=True)
    found = drift(session.decoder, made.decoder, IDS[1:])  # the first row told how to round
    assert abs(found.mean - result.drift.mean) < 1e-6, "what was measured is not what was written"
    formats = {made.parameters[name].format for name in made.parameters if made.parameters[name].quantized}
    assert {(f.bits, f.group_size) for f in formats} == {(8, 32)}


def test_a_weak_adapter_gets_more_bits(lora, quantized, opened, created, tmp_path):
    session = opened(quantized(3), created("cpu"))
    session.adapt([adapter(lora, 0.1)])
    result = fused(session, tmp_path / "fused", None)
    assert len(result.tried) > 1 and result.tried[0].share > 0.25 >= result.tried[-1].share
    made = open_session(tmp_path / "fused", backend=created("cpu"), exact=True).parameters
    bits = {name: made[name].format.bits for name in made if made[name].quantized}
    raised = {name for name, count in bits.items() if count > 3}
    assert {name.rpartition(".")[2] for name in raised} == {"q", "v", "up"}, "others were raised, or not these"
    for name in set(bits) - raised:
        own = session.parameters[name]
        assert all(np.array_equal(own.parts[p], made[name].parts[p]) for p in own.parts), f"{name} was touched"


def test_more_bits_leave_the_base_where_it_stood(lora, quantized, opened, created, tmp_path):
    """An adapter that does nothing, in more bits: exactly the old numbers."""
    session = opened(quantized(4), created("cpu"))
    session.adapt([adapter(lora, 0.0)])
    fused(session, tmp_path / "fused", None, bits=6)
    made = open_session(tmp_path / "fused", backend=created("cpu"), exact=True)
    name = "layers.1.attn.v"
    assert made.parameters[name].format.bits == 6
    own, new = (to_float(p[name]) for p in (session.parameters, made.parameters))
    assert np.abs(own - new).max() <= 1e-3 * np.abs(own).max()


@pytest.mark.parametrize(
    ("options", "hint"), [({"bits": 2}, "Leave out --bits"), ({"share": 1e-9}, "--dtype bfloat16")]
)
def test_an_adapter_is_never_erased_in_silence(options, hint, lora, quantized, opened, created, tmp_path):
    session = opened(quantized(4), created("cpu"))
    session.adapt([adapter(lora, 0.1)])
    with pytest.raises(OnDeviceError, match="would be lost") as raised:
        fused(session, tmp_path / "fused", None, **options)
    assert hint in raised.value.hint
    assert not list(tmp_path.iterdir())


def test_dense_out_of_few_bits(lora, quantized, opened, created, tmp_path):
    session = opened(quantized(4), created("cpu"))
    session.adapt([adapter(lora, 0.3)])
    result = fused(session, tmp_path / "fused", None, dtype="float32")
    assert result.drift.mean < 1e-6
    assert list(result.formats) == ["float32"]
    assert "quantization" not in json.loads((tmp_path / "fused" / "config.json").read_text())


def test_what_makes_no_sense(lora, opened, tmp_path):
    session = opened("llama")
    with pytest.raises(BadOption, match="no adapter"):
        fused(session, tmp_path / "fused", None)
    with pytest.raises(OnDeviceError, match="exists already"):
        fused(session, tmp_path, None)
    with pytest.raises(OnDeviceError, match="no folder"):
        fused(session, tmp_path / "nowhere" / "fused", None)
    for options in ({"dtype": "int8"}, {"dtype": "float32", "bits": 4}, {"bits": 7}, {"share": 0}):
        with pytest.raises(BadOption):
            Options(**options)


def test_feedback_keeps_what_rounding_alone_erases(quantized, model, opened, created):
    """A change of less than half a step everywhere, all in one direction of what flows in."""
    from ondevice.schemes import parts
    from ondevice.tensors import Affine
    from ondevice.tools.fuse.feedback import _inverse_factor
    from ondevice.tools.fuse.rounding import rounded

    draw = np.random.default_rng(0)
    base = opened(quantized(4)).parameters["layers.0.attn.q"]
    direction = draw.normal(size=(1, 64)).astype(np.float32)
    change = (
        0.2 * np.abs(parts(base).scales).mean() * np.outer(draw.normal(size=64), np.sign(direction)).astype(np.float32)
    )
    x = (direction + 0.3 * draw.normal(size=(256, 64))).astype(np.float32)
    form, values = base.format, to_float(base) + change
    assert isinstance(form, Affine)
    lost = [
        np.square(x @ (to_float(rounded(base, values, form, factors)) - values).T).mean()
        for factors in (None, [_inverse_factor(x)])
    ]
    effect = np.square(x @ change.T).mean()
    assert lost[1] < 0.2 * effect < 0.5 * effect < lost[0]


def test_feedback_goes_from_every_column_to_all_behind_it():
    """Beside the plain loop, in float64; 192 columns in groups of 64."""
    from ondevice.tools.fuse.feedback import _inverse_factor, fed_back

    draw = np.random.default_rng(1)
    values, x = (draw.normal(size=size).astype(np.float32) for size in ((5, 192), (300, 192)))
    x[:, 100:] += x[:, :92]  # columns far apart go together
    upper, (scales, biases) = _inverse_factor(x), (np.full((5, 3), 0.25, np.float32), np.full((5, 3), -2, np.float32))
    left, codes = values.astype(np.float64), np.empty(values.shape)
    for j in range(192):
        codes[:, j] = np.clip(np.rint((left[:, j] + 2) / 0.25), 0, 15)
        error = (left[:, j] - (codes[:, j] * 0.25 - 2)) / upper[j, j]
        left[:, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
    assert (fed_back(values, (scales, biases), 4, [upper]) == codes).mean() > 0.99


def test_drift_is_the_divergence_of_predictions(opened, created):
    session = opened("llama", created("cpu"))
    other = opened("llama", created("cpu"))
    name = "layers.0.attn.o"
    values = session.backend.numpy(session.backend.dequantize(session.weights[name]))
    changed = Decoder(other.config, other.backend, {**other.weights, name: other.backend.array(values * 1.1)})
    found = drift(session.decoder, changed, IDS)
    p, q = (_predictions(decoder) for decoder in (session.decoder, changed))
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert abs(found.mean - kl.mean()) < 1e-6 and abs(found.most - kl.max()) < 1e-5
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean()


def _predictions(decoder):
    from ondevice.backends.base import Step

    logits = decoder.ops.numpy(decoder(decoder.ops.array(IDS), Step.whole(*IDS.shape))).astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
