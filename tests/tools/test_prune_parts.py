"""prune: layers, channels, heads, experts and single weights, against transformers and least squares."""

from __future__ import annotations

import json
from dataclasses import replace
from pkgutil import resolve_name

import numpy as np
import pytest

from ondevice.cli import main
from ondevice.errors import BadFile, BadOption, OnDeviceError
from ondevice.schemes import to_float
from ondevice.tools.progress import ended
from ondevice.tools.prune import Amount, Options, Sparsity, depth, experts, prune, width
from ondevice.tools.prune.cutting import Cut
from ondevice.tools.prune.elimination import eliminate
from ondevice.tools.prune.running import write
from ondevice.tools.prune.sparsity import _by_inputs
from ondevice.tools.prune.subject import Subject
from ondevice.tools.quantize import Options as QuantizeOptions
from ondevice.tools.quantize import quantize
from tests.models.twins import make
from tests.tools.wide_models import LLAMA, MOE, parameters, write_model

from .test_prune import logits, pruned

DEEP = LLAMA | {"num_hidden_layers": 5}
IDS = np.arange(3, 35, dtype=np.int32)[None]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the and in the other hand, on a cold day; " * 60)
    return path


def transformers_logits(path, ids=IDS, keep=None):
    """keep: the layers of the model that are used."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    if keep is not None:
        model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in keep)
        model.config.num_hidden_layers = len(keep)
    return model(torch.tensor(ids), use_cache=False).logits.detach().numpy()


def close(one, other, tolerance=1e-4):
    return np.abs(one - other).max() < tolerance * max(1.0, np.abs(other).max())


# ---- layers


def test_dropped_layers_are_gone_and_the_others_stay(tmp_path):
    source = write_model(tmp_path / "in", DEEP, "float32")
    result = pruned(source, tmp_path / "out", drop_layers=(1, 3))
    assert result.sizes["layers"] == (5, 3)
    made = logits(tmp_path / "out", IDS)
    assert close(made, transformers_logits(tmp_path / "out"))
    assert close(made, transformers_logits(source, keep=[0, 2, 4]))


def test_layers_that_do_nothing_go_first(tmp_path, text):
    idle = {f"layers_{i}_{part}": np.zeros((64, n), np.float32) for i in (1, 3) for part, n in
            (("attn_o", 64), ("mlp_down", 96))}  # fmt: skip
    source = write_model(tmp_path / "in", DEEP, "float32", **idle)
    result = pruned(source, tmp_path / "out", layers=Amount(2), calibration=text, length=32, tokens=256)
    assert [row.stays for row in result.scores[0].rows] == [1, 0, 1, 0, 1]
    assert close(logits(tmp_path / "out", IDS), logits(source, IDS))


def test_lists_by_layer_in_the_config_are_cut_too(tmp_path):
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    hf = LLAMA | {"model_type": "qwen3", "head_dim": 16, "num_hidden_layers": 4, "layer_types": kinds}
    hf |= {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}
    source = write_model(tmp_path / "in", hf, "float32")
    pruned(source, tmp_path / "out", drop_layers=(1,))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == [kinds[i] for i in (0, 2, 3)]
    assert close(logits(tmp_path / "out", IDS), transformers_logits(tmp_path / "out"))


@pytest.mark.parametrize("what", ["layers", "channels", "heads"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "gemma2", "qwen2", "starcoder2", "granite", "mixtral"])
def test_other_families_are_cut_as_transformers_has_them(tmp_path, family, what):
    """Every kind of projection (separate, fused, grouped, transposed) and of config.json."""
    torch = pytest.importorskip("torch")
    twin = make(family)
    twin.save_pretrained(tmp_path / "in")
    with Subject(tmp_path / "in", Options(drop_layers=(1,))) as subject:
        layers = subject.config.layers
        kept = {
            "layers": tuple(i for i in range(len(layers)) if i != 1),
            "channels": {i: np.arange(3, layer.feed_forward.hidden) for i, layer in enumerate(layers)},
            "heads": {i: np.arange(1, layer.mixer.kv_heads) for i, layer in enumerate(layers)},
        }[what]
        cut = replace(Cut.nothing(subject.config), **{what: kept})
        refused = (family, what) in {("gpt2", "heads"), ("gpt_neox", "heads"), ("mixtral", "channels")}
        if refused:
            with pytest.raises(OnDeviceError):
                list(write(subject, cut, tmp_path / "out"))
            return
        list(write(subject, cut, tmp_path / "out"))
    loaded = type(twin).from_pretrained(tmp_path / "out", dtype="float32").eval()
    wanted = loaded(torch.tensor(IDS[:, :17]), use_cache=False).logits.detach().numpy()
    assert close(logits(tmp_path / "out", IDS[:, :17]), wanted)


@pytest.mark.parametrize(
    ("name", "layer", "words"),
    [
        ("lfm2", 0, {"layer_types": ["full_attention", "conv"]}),
        ("lfm2_moe", 0, {"num_dense_layers": 0, "layer_types": ["full_attention", "conv"]}),
        ("qwen3_moe-some", 0, {"decoder_sparse_step": 1, "mlp_only_layers": [1, 2, 3]}),
        ("qwen2_moe-some", 1, {"mlp_only_layers": []}),
        ("deepseek_v3", 0, {"first_k_dense_replace": 0}),
        ("llama4", 1, {"moe_layers": [2], "no_rope_layers": [1, 1, 0, 1]}),
    ],
)
def test_layers_of_several_kinds(tmp_path, name, layer, words):
    """Convolutions among attention, experts in some layers: the file says which are left, and transformers reads it."""
    torch = pytest.importorskip("torch")
    twin = make(name)
    twin.save_pretrained(tmp_path / "in")
    list(prune(tmp_path / "in", tmp_path / "out", Options(drop_layers=(layer,))))
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: made[key] for key in words} == words
    loaded = type(twin).from_pretrained(tmp_path / "out", dtype="float32").eval()
    wanted = loaded(torch.tensor(IDS[:, :17]), use_cache=False).logits.detach().numpy()
    assert close(logits(tmp_path / "out", IDS[:, :17]), wanted)


def test_an_older_hybrid_names_the_layers_that_attend(tmp_path):
    make("lfm2").save_pretrained(tmp_path / "in")
    hf = json.loads((tmp_path / "in" / "config.json").read_text())
    del hf["layer_types"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(hf | {"full_attn_idxs": [1]}))
    list(prune(tmp_path / "in", tmp_path / "out", Options(drop_layers=(0,))))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["full_attn_idxs"] == [0]


# ---- channels and heads


def test_elimination_repairs_by_least_squares():
    draw = np.random.default_rng(3)
    x = draw.normal(size=(400, 12)) @ draw.normal(size=(12, 12))
    weight, gram = draw.normal(size=(6, 12)).astype(np.float32), x.T @ x / 400
    damped = gram + 0.01 * np.diag(gram).mean() * np.eye(12)
    for size, count in ((1, 5), (3, 2)):
        found = eliminate(weight, gram, size, count)
        kept = (found.kept[:, None] * size + np.arange(size)).reshape(-1)
        wanted = weight @ damped[:, kept] @ np.linalg.inv(damped[np.ix_(kept, kept)])
        assert np.abs(found.weight[:, kept] - wanted).max() < 1e-5
        assert len(found.kept) == 12 // size - count
        assert not np.delete(found.weight, kept, 1).any()
        change = found.weight - weight
        assert found.loss == pytest.approx(
            np.trace(change @ gram @ change.T) / np.trace(weight @ gram @ weight.T), 1e-5
        )


def test_elimination_finds_what_is_superfluous():
    """Columns that meet nothing, and one of two that always meet the same."""
    draw = np.random.default_rng(4)
    x = draw.normal(size=(300, 8))
    x[:, 2], x[:, 5] = 0, x[:, 1]
    found = eliminate(draw.normal(size=(4, 8)).astype(np.float32), x.T @ x / 300, 1, 2)
    assert 2 not in found.kept and (1 in found.kept) != (5 in found.kept)
    assert found.loss < 1e-4


@pytest.mark.parametrize("repair", [True, False])
@pytest.mark.parametrize("hf", [LLAMA, LLAMA | {"mlp_bias": True, "attention_bias": True}], ids=["plain", "biased"])
def test_idle_channels_and_heads_go_without_a_trace(tmp_path, text, hf, repair):
    draw = np.random.default_rng(6)
    idle = {}
    for i in range(2):
        down, o = draw.normal(size=(64, 96)) * 0.15, draw.normal(size=(64, 64)) * 0.15
        down[:, 8 + i :: 3], o[:, 32 * i : 32 * (i + 1)] = 0, 0
        idle |= {f"layers_{i}_mlp_down": down.astype(np.float32), f"layers_{i}_attn_o": o.astype(np.float32)}
    source = write_model(tmp_path / "in", hf, "float32", **idle)
    result = pruned(
        source, tmp_path / "out", channels=Amount(29), heads=Amount(1), calibration=text, length=32, repair=repair
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (67, 2, 1)
    assert result.sizes["channels"] == (96, 67)
    made = logits(tmp_path / "out", IDS)
    assert close(made, transformers_logits(tmp_path / "out"))
    assert close(made, logits(source, IDS))


@pytest.mark.parametrize("repair", [True, False])
@pytest.mark.parametrize("first", [{"drop_layers": (0,)}, {"heads": Amount(count=1)}], ids=["layer", "heads"])
def test_what_goes_later_is_chosen_by_what_is_left(tmp_path, text, first, repair):
    """Two kinds of cuts at once are those two, one after the other."""
    model, then = write_model(tmp_path / "in", DEEP, "float32"), {"channels": Amount(count=64)}
    common = {"calibration": text, "repair": repair, "tokens": 512, "length": 64}
    pruned(model, tmp_path / "both", **first, **then, **common)
    pruned(model, tmp_path / "first", **first, **common)
    pruned(tmp_path / "first", tmp_path / "then", **then, **common)
    both, apart = parameters(tmp_path / "both"), parameters(tmp_path / "then")
    assert all(close(to_float(both[name]), to_float(apart[name]), 1e-3) for name in both)


def test_repair_makes_up_for_what_goes():
    draw = np.random.default_rng(5)
    x = draw.normal(size=(500, 6)) @ draw.normal(size=(6, 24)) + 0.3 * draw.normal(size=(500, 24))
    weight, gram = draw.normal(size=(8, 24)).astype(np.float32), x.T @ x / 500
    assert eliminate(weight, gram, 1, 8).loss < 0.3 * eliminate(weight, gram, 1, 8, repair=False).loss


def test_shares_leave_whole_groups_of_quantization(tmp_path, text):
    pruned(write_model(tmp_path / "in"), tmp_path / "out", channels=Amount(share=0.3), calibration=text, length=32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == 64


# ---- experts


def test_experts_go_by_what_they_add(tmp_path, text):
    down = np.random.default_rng(8).normal(size=(4, 64, 96)).astype(np.float32) * 0.15
    down[2] = 0
    source = write_model(tmp_path / "in", MOE, "float32", layers_0_moe_down=down, layers_1_moe_down=down)
    result = pruned(source, tmp_path / "out", experts=Amount(1), calibration=text, length=32)
    assert [row.stays for row in result.scores[0].rows] == [1, 1, 0, 1] * 2
    before, after = parameters(source), parameters(tmp_path / "out")
    for part in ("router", "gate", "up", "down"):
        kept = to_float(before[f"layers.1.moe.{part}"])[[0, 1, 3]]
        assert np.array_equal(to_float(after[f"layers.1.moe.{part}"]), kept)
    assert close(logits(tmp_path / "out", IDS), transformers_logits(tmp_path / "out"))


# ---- single weights


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("sparsity", ["50%", "2:4"])
def test_so_many_weights_become_zero(tmp_path, text, method, sparsity):
    source = write_model(tmp_path / "in")
    result = pruned(
        source, tmp_path / "out", sparsity=Sparsity.parse(sparsity), method=method, calibration=text, length=32
    )
    before, after = parameters(source), parameters(tmp_path / "out")
    for name in after:
        values = to_float(after[name])
        if values.ndim == 1 or name == "embed":
            assert np.array_equal(values, to_float(before[name]))
            continue
        assert after[name].format == before[name].format
        assert np.count_nonzero(values) == pytest.approx(values.size / 2, rel=0.02)
        if sparsity == "2:4":
            assert (np.count_nonzero(values.reshape(-1, 4), axis=-1) <= 2).all()
    assert result.after.nonzero < result.before.nonzero == result.before.parameters
    assert result.after.parameters == result.before.parameters


@pytest.mark.parametrize("sparsity", ["60%", "1:4"])
def test_each_method_does_better_than_the_last(sparsity):
    draw = np.random.default_rng(9)
    x = draw.normal(size=(512, 64)) * np.exp(draw.normal(size=64)) @ (np.eye(64) + 0.3 * draw.normal(size=(64, 64)))
    weight, gram = draw.normal(size=(48, 64)).astype(np.float32), x.T @ x / 512

    def error(method, gram_seen):
        change = _by_inputs(weight, gram_seen, Sparsity.parse(sparsity), method) - weight
        return np.trace(change @ gram @ change.T)

    magnitude = error("wanda", np.eye(64))
    assert error("sparsegpt", gram) < 0.8 * error("wanda", gram) < 0.8 * magnitude


def test_sparse_mixtures(tmp_path, text):
    source = write_model(tmp_path / "in", MOE, "float32")
    pruned(source, tmp_path / "out", sparsity=Sparsity.parse("50%"), calibration=text, length=32)
    after = parameters(tmp_path / "out")
    assert np.count_nonzero(to_float(after["layers.0.moe.down"])) == pytest.approx(4 * 64 * 48, rel=0.02)
    assert np.count_nonzero(to_float(after["layers.0.moe.router"])) == 4 * 64


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_layers": (0, 9)}, "There is no layer 9: this model has 0 to 4"),
        ({"drop_layers": (0, 1, 2, 3, 4)}, "names every layer"),
        ({"layers": Amount(5)}, "has 5 layers; one must stay"),
        ({"channels": Amount(96)}, "would drop 96 of 96 channels"),
        ({"heads": Amount(2)}, "would drop 2 of 2 heads"),
        ({"experts": Amount(1)}, "has no experts"),
    ],
)
def test_targets_that_leave_nothing(tmp_path, text, options, message):
    source = write_model(tmp_path / "in", DEEP)
    with pytest.raises(BadOption, match=message):
        pruned(source, tmp_path / "out", calibration=text, length=32, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "in"}


def test_no_expert_is_left_for_a_token(tmp_path, text):
    source = write_model(tmp_path / "in", MOE)
    with pytest.raises(BadOption, match="would leave 1 of 4, but a token is sent to 2"):
        pruned(source, tmp_path / "out", experts=Amount(3), calibration=text, length=32)


def test_nan_is_named(tmp_path):
    broken = np.ones((64, 96), np.float32)
    broken[5, 7] = np.nan
    source = write_model(tmp_path / "in", layers_1_mlp_down=broken)
    with pytest.raises(BadFile, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds numbers that are NaN"):
        pruned(source, tmp_path / "out", drop_layers=(0,))
    assert not (tmp_path / "out").exists()


def test_quantized_models_keep_their_codes_or_are_refused(tmp_path, text):
    write_model(tmp_path / "in", DEEP)
    quantize(tmp_path / "in", tmp_path / "q", QuantizeOptions("rtn", 4, 32))
    pruned(tmp_path / "q", tmp_path / "out", drop_layers=(0, 1), keep_vocabulary=text)
    before, after = parameters(tmp_path / "q"), parameters(tmp_path / "out")
    for part, values in before["layers.2.mlp.down"].parts.items():
        assert np.array_equal(values, after["layers.0.mlp.down"].parts[part])
    with pytest.raises(OnDeviceError, match="quantized") as refused:
        pruned(tmp_path / "q", tmp_path / "no", channels=Amount(32), calibration=text, length=32)
    assert "--dequantize" in refused.value.hint
    pruned(tmp_path / "q", tmp_path / "yes", channels=Amount(32), calibration=text, length=32, dequantize=True)
    assert close(logits(tmp_path / "yes", IDS), transformers_logits(tmp_path / "yes"), 2e-2)


def test_a_text_shorter_than_a_window(tmp_path):
    (tmp_path / "short.txt").write_text("the end")
    source = write_model(tmp_path / "in")
    with pytest.raises(BadOption, match="less than one calibration window"):
        pruned(source, tmp_path / "out", channels=Amount(32), calibration=tmp_path / "short.txt", length=32)


@pytest.mark.parametrize("given", ["0", "-3", "x", "100%", "0%", "nan%", "1.5"])
def test_amounts_that_make_no_sense(given):
    with pytest.raises(BadOption, match="makes no sense"):
        Amount.parse(given, "--layers")


@pytest.mark.parametrize("given", ["4:2", "2:2", "5", "0:4", "2:", "a:b"])
def test_sparsities_that_make_no_sense(given):
    with pytest.raises(BadOption, match="makes no sense"):
        Sparsity.parse(given)


def test_sparsity_goes_alone():
    with pytest.raises(BadOption, match="goes alone"):
        Options(sparsity=Sparsity(0.5), layers=Amount(1))


def test_the_scores_are_shown_and_drawn(tmp_path, text, capsys):
    pytest.importorskip("matplotlib")
    source = write_model(tmp_path / "in", DEEP)
    common = ["--layers", "1", "--calibration", str(text), "--tokens", "256", "--dry-run"]
    with pytest.raises(SystemExit) as stop:
        main(["prune", str(source), *common, "--plot", str(tmp_path / "scores.svg")])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "influence" in shown and "nothing is written" in shown
    assert "What the model would miss" in (tmp_path / "scores.svg").read_text()


# ---- fewer tokens, and less besides


@pytest.mark.parametrize(
    "choose, reads, options",
    [
        (width.channels, "width.stream", {"channels": Amount(4)}),
        (depth.choose, "depth.Passes", {"layers": Amount(1)}),
        (experts.choose, "experts.stream", {"experts": Amount(1)}),
    ],
)
def test_what_else_goes_is_chosen_by_the_text_as_it_will_be_cut(choose, reads, options, tmp_path, text, monkeypatch):
    source = write_model(tmp_path / "in", MOE if choose is experts.choose else DEEP, "float32")
    where, shown = f"ondevice.tools.prune.{reads}", []
    read = resolve_name(where)

    def watched(*given):
        shown.extend(each for each in given if isinstance(each, np.ndarray))
        return read(*given)

    monkeypatch.setattr(where, watched)
    with Subject(source, Options(calibration=text, tokens=64, length=32, **options)) as subject:
        windows = ended(subject.windows())
        gone = max(set(windows.reshape(-1).tolist()) - set(subject.tokenizer.special_ids))
        kept = np.setdiff1d(np.arange(subject.config.vocab), [gone])
        ended(choose(subject, replace(Cut.nothing(subject.config, None), tokens=kept)))
        (ids,) = shown
        whole = subject.tokenizer.decode(windows.reshape(-1).tolist())
        assert gone in windows and gone not in ids
        assert whole.startswith(subject.tokenizer.decode(ids.reshape(-1).tolist()))
