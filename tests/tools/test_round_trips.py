"""What tools make of the families that hold their weights otherwise than Llama: latents, clamped experts, convolutions,
delta rules. transformers loads what is dense and says what we say; what is quantized says about what it said."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from ondevice.adapters import Adapter, LowRank, Modules, write_adapter
from ondevice.backends.base import Step
from ondevice.errors import OnDeviceError
from ondevice.runtime.session import open_session
from ondevice.tensors import dense
from ondevice.testing.family import logits_of
from ondevice.tools.fuse import Options as FuseOptions
from ondevice.tools.fuse import fuse
from ondevice.tools.prune import Amount, Sparsity, prune
from ondevice.tools.prune import Options as PruneOptions
from ondevice.tools.quantize import METHODS, quantize
from ondevice.tools.quantize import Options as QuantizeOptions
from tests.models import twins
from tests.tools.wide_models import write_model

IDS = np.random.default_rng(0).integers(3, 80, (2, 16)).astype(np.int32)
FAMILIES = (
    "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "granitemoe-shared", "qwen3_next", "lfm2", "lfm2_moe",
)  # fmt: skip
ONE = Amount(count=1)
CUTS = {  # what can go together, besides tokens and a layer
    "deepseek_v2": {"channels": Amount(count=4), "experts": ONE},
    "deepseek_v3": {"channels": Amount(count=4), "experts": Amount(share=0.4)},
    "gpt_oss": {"heads": ONE, "experts": ONE},
    "granitemoe": {"heads": ONE, "experts": ONE},
    "granitemoe-shared": {"heads": ONE, "experts": ONE},
    "qwen3_next": {"heads": ONE, "experts": ONE},
    "lfm2": {"channels": Amount(count=4)},
    "lfm2_moe": {"channels": Amount(count=4), "heads": ONE, "experts": ONE},
}
MORE_ROWS = {"hidden_size": 96, "intermediate_size": 64}  # which groups of quantization divide
METHOD = {  # one for each family where time is short
    "deepseek_v2": "gptq", "deepseek_v3": "auto", "gpt_oss": "search", "granitemoe": "auto",
    "granitemoe-shared": "rtn", "qwen3_next": "awq", "lfm2": "auto", "lfm2_moe": "distill",
}  # fmt: skip
PAIRS = [
    pytest.param(name, method, marks=[] if METHOD[name] == method else [pytest.mark.slow])
    for name in FAMILIES
    for method in METHODS
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the and in the other hand, on a cold day; " * 60)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(a twin's name, fields) -> (the twin, its folder, with a tokenizer)"""
    made = write_model(tmp_path_factory.mktemp("tokenizer") / "model")

    def make(name: str, **fields):
        folder = tmp_path_factory.mktemp("models") / name
        twin = twins.make(name, vocab_size=106, **fields)
        twin.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(made / file, folder)
        return twin, folder

    return make


def ours(path, ids=IDS):
    with open_session(path, backend="cpu", exact=True, context=16) as session:
        ops = session.backend
        return np.array(ops.numpy(session.decoder(ops.array(ids), Step.whole(*ids.shape))))


def same(path, twin, ids=IDS):
    """That transformers loads a folder whole, and says what we say."""
    read, found = type(twin).from_pretrained(path, output_loading_info=True, dtype="float32")
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    want = logits_of(read.eval(), ids)
    assert np.abs(ours(path, ids) - want).max() < 2e-4 * np.sqrt(np.mean(want**2))
    return want


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_and_sparse(name, model, text, tmp_path):
    twin, source = model(name)
    calibration = {"calibration": text, "tokens": 256, "length": 32}
    cut = PruneOptions(vocabulary=Amount(count=102), drop_layers=(1,), **CUTS[name], **calibration)
    *_, result = prune(source, tmp_path / "cut", cut)
    for what in ("tokens", "layers", *CUTS[name]):
        assert result.sizes[what][1] is None or result.sizes[what][1] < result.sizes[what][0], what
    same(tmp_path / "cut", twin)
    list(prune(source, tmp_path / "sparse", PruneOptions(sparsity=Sparsity(0.5), **calibration)))
    before, after = logits_of(twin, IDS), same(tmp_path / "sparse", twin)
    assert np.abs(before - after).max() > 0.1, "nothing went"


@pytest.mark.parametrize("name", FAMILIES)
def test_fused(name, model, text, tmp_path):
    """An adapter on every matrix of the layers, latents and experts among them."""
    twin, source = model(name)
    with open_session(source, backend="cpu", exact=True, context=64) as session:
        modules = Modules(session.family, session.config)
        write_adapter(tmp_path / "adapter", everywhere(modules), modules)
        session.adapt([(tmp_path / "adapter", 1.0)])
        ops = session.backend
        adapted = np.array(ops.numpy(session.decoder(ops.array(IDS), Step.whole(*IDS.shape))))
        list(fuse(session, tmp_path / "fused", FuseOptions(text=text, tokens=64)))
    assert np.abs(adapted - logits_of(twin, IDS)).max() > 0.1, "the adapter does nothing"
    assert np.abs(same(tmp_path / "fused", twin) - adapted).max() < 1e-3 * np.sqrt(np.mean(adapted**2))


def everywhere(modules: Modules) -> Adapter:
    draw = np.random.default_rng(1).normal
    updates, latent = {}, {}
    for name, shape in modules.shapes.items():
        if len(shape) < 2 or not name.startswith("layers.") or name.endswith((".taps", ".router", ".bias")):
            continue
        down = np.float32(draw(size=(*shape[:-2], 2, shape[-1])) * 0.3)
        if ".latent." in name and len(shape) == 3:  # heads share what is drawn first
            down = latent.setdefault(name.split(".")[1], down[:1]) + np.zeros_like(down)
        updates[name] = LowRank(dense(down), dense(np.float32(draw(size=(*shape[:-1], 2)) * 0.1)), 1.0)
    return Adapter(updates)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_quantized(name, method, model, text, tmp_path):
    """At 8 bits little changes on average; experts are elected otherwise here and there."""
    rows = {} if "granite" in name or name == "gpt_oss" else {"moe_intermediate_size": 64}
    twin, source = model(name, **MORE_ROWS, **rows)
    short = {"start": "rtn", "steps": 3} if method == "distill" else {}
    options = QuantizeOptions(method, 8, 32, calibration=text, tokens=256, length=32, **short)
    result = quantize(source, tmp_path / "out", options)
    assert 8 < result.bpw < 24
    want, got = logits_of(twin, IDS), ours(tmp_path / "out")
    assert np.abs(want - got).mean() < (0.3 if name == "qwen3_next" else 0.1) * np.sqrt(np.mean(want**2))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("deepseek_v3", {"heads": ONE}, "heads cannot be cut alike: no layer has any"),
        ("deepseek_v3", {"experts": ONE}, "--experts 1 cannot be taken alike from the 4 groups"),
        ("gpt_oss", {"channels": ONE}, "channels cannot be cut alike: no layer has any"),
        ("lfm2", {"experts": ONE}, "has no experts"),
        ("lfm2", {"heads": ONE}, "share the whole width"),
    ],
)
def test_what_cannot_go_is_said(name, options, told, model, text, tmp_path):
    _, source = model(name)
    with pytest.raises(OnDeviceError, match=told):
        list(prune(source, tmp_path / "out", PruneOptions(calibration=text, tokens=256, length=32, **options)))
    assert not (tmp_path / "out").exists()
