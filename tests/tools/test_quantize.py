"""quantize: bit for bit what MLX makes with --method rtn; folders that our backends and mlx-lm read; bad input."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
from safetensors import safe_open

from ondevice.backends.base import Step
from ondevice.checkpoint import verify
from ondevice.cli import main
from ondevice.errors import BadFile, BadOption, OnDeviceError
from ondevice.runtime.session import open_session
from ondevice.schemes import to_float
from ondevice.tensors import Affine, floats
from ondevice.tools.calibration import samples
from ondevice.tools.quantize import Options, quantize
from ondevice.tools.quantize.calibrated import Rounding
from ondevice.tools.quantize.matrices import matrices
from tests.files.small_models import write_llama
from tests.models import twins
from tests.tools.wide_models import LLAMA, MOE, parameters, write_model

IDS = np.arange(3, 23, dtype=np.int32)[None]


def short(method="auto", **options):
    """Options with little calibration."""
    return Options(method, **{"tokens": 512, "length": 32} | options)


def logits(path, backend="reference"):
    with open_session(path, backend=backend, exact=True) as session:
        ops = session.backend
        return np.array(ops.numpy(session.decoder(ops.array(IDS), Step.whole(*IDS.shape))))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 64), (5, 32), (6, 64), (8, 32)])
def test_rtn_is_mlx_quantize_bit_for_bit(tmp_path, bits, group, dtype):
    mx = pytest.importorskip("mlx.core")
    source = write_model(tmp_path / "in", dtype=dtype)
    result = quantize(source, tmp_path / "out", Options("rtn", bits, group))
    before, after = parameters(source), parameters(tmp_path / "out")
    for name in before:
        if len(before.shapes[name]) == 1:
            assert after[name].format == before[name].format
            continue
        wanted = group if before.shapes[name][-1] % group == 0 else 32
        assert after[name].format == Affine(bits, wanted, dtype)
        values = mx.array(to_float(before[name])).astype(getattr(mx, dtype))
        weight, *affine = mx.quantize(values, wanted, bits)
        assert np.array_equal(after[name].parts["weight"], np.array(weight))
        for part, theirs in zip(("scales", "biases"), affine, strict=True):
            assert np.array_equal(floats(after[name].parts[part], dtype), np.array(theirs.astype(mx.float32)))
    assert result.nbytes == sum(after[name].nbytes for name in after)
    assert result.bpw == pytest.approx(8 * result.nbytes / sum(after[name].size for name in after))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_is_mlx_quantize_bit_for_bit(tmp_path, dtype):
    mx = pytest.importorskip("mlx.core")
    source = write_model(tmp_path / "in", dtype=dtype)
    result = quantize(source, tmp_path / "out", Options("rtn", mode="mxfp4"))
    before, written = parameters(source), safetensors(tmp_path / "out")
    for name in matrices(before):
        values = mx.array(to_float(before[name])).astype(getattr(mx, dtype))
        weight, exponents = mx.quantize(values, group_size=32, bits=4, mode="mxfp4")
        module = before.stored(name)[0].removesuffix(".weight")
        assert np.array_equal(written[f"{module}.weight"], np.array(weight))
        assert np.array_equal(written[f"{module}.scales"], np.array(exponents))
        theirs = mx.dequantize(weight, exponents, group_size=32, bits=4, mode="mxfp4").astype(mx.float32)
        assert np.array_equal(to_float(parameters(tmp_path / "out")[name]), np.array(theirs))
    assert result.nbytes == verify(tmp_path / "out").nbytes
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert block == {"group_size": 32, "bits": 4, "mode": "mxfp4"}


def safetensors(folder):
    """The arrays of a folder by their names in the file, as MLX's convention has them."""
    with safe_open(folder / "model.safetensors", "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys() if "norm" not in name}  # noqa: SIM118


@pytest.mark.parametrize("backend", ["cpu", "cuda", "mlx"])
@pytest.mark.parametrize("hf", [LLAMA, MOE], ids=["llama", "moe"])
def test_mxfp4_runs_everywhere(tmp_path, hf, backend):
    pytest.importorskip({"cpu": "numpy", "cuda": "torch", "mlx": "mlx.core"}[backend])
    quantize(write_model(tmp_path / "in", hf, "float32"), tmp_path / "out", Options("rtn", mode="mxfp4"))
    wanted = logits(tmp_path / "out")
    assert np.abs(logits(tmp_path / "out", backend) - wanted).max() < 1e-3 * np.abs(wanted).max()
    if backend == "mlx":
        utils, mx = pytest.importorskip("mlx_lm.utils"), pytest.importorskip("mlx.core")
        theirs = np.array(utils.load_model(tmp_path / "out")[0](mx.array(IDS)))
        assert np.abs(theirs - wanted).max() < 1e-2 * np.abs(wanted).max()


def test_a_group_that_does_not_divide_a_row_is_recorded_by_tensor(tmp_path):
    quantize(write_model(tmp_path / "in"), tmp_path / "out", Options("rtn", 4, 128))
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (block["group_size"], block["bits"]) == (64, 4)
    assert block["model.layers.0.mlp.down_proj"] == {"group_size": 32, "bits": 4, "mode": "affine"}


def test_rows_that_no_group_divides_stay_as_they_are(tmp_path):
    source = write_model(tmp_path / "in", LLAMA | {"intermediate_size": 40})
    result = quantize(source, tmp_path / "out", Options("rtn"))
    assert [note for note in result.notes if "mlp.down_proj.weight stays as it is" in note and "40" in note]
    after = parameters(tmp_path / "out")
    assert np.array_equal(to_float(after["layers.0.mlp.down"]), to_float(parameters(source)["layers.0.mlp.down"]))
    assert after["layers.0.mlp.up"].quantized


UNTIED = LLAMA | {"tie_word_embeddings": False}
PAIRS = [(LLAMA, "rtn"), (LLAMA, "search"), (UNTIED, "gptq"), (UNTIED, "awq"), (MOE, "rtn"), (MOE, "auto")]


@pytest.mark.parametrize(("hf", "method"), PAIRS)
def test_what_is_written_runs_everywhere(tmp_path, hf, method):
    quantize(write_model(tmp_path / "in", hf, "float32"), tmp_path / "out", short(method, bits=8, group_size=32))
    wanted = logits(tmp_path / "out")
    assert np.abs(wanted - logits(tmp_path / "in")).mean() < 0.1 * np.abs(wanted).mean()
    for backend, module in (("cpu", "numpy"), ("cuda", "torch"), ("mlx", "mlx.core")):
        pytest.importorskip(module)
        assert np.abs(logits(tmp_path / "out", backend) - wanted).max() < 1e-3 * np.abs(wanted).max()
    utils, mx = pytest.importorskip("mlx_lm.utils"), pytest.importorskip("mlx.core")
    theirs = np.array(utils.load_model(tmp_path / "out")[0](mx.array(IDS)))
    assert np.abs(theirs - wanted).max() < 1e-3 * np.abs(wanted).max()


ONE_NORM = {  # for attention and for the feed-forward beside it
    "cohere": {"logit_scale": 0.25}, "phi": {"num_key_value_heads": 4, "hidden_act": "gelu_new"},
    "stablelm": {"use_parallel_residual": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", ONE_NORM)
def test_awq_scales_all_that_read_a_norm(tmp_path, kind):
    hf = LLAMA | {"model_type": kind, "tie_word_embeddings": kind == "cohere"} | ONE_NORM[kind]
    original = logits(write_model(tmp_path / "in", hf, "float32"))
    apart = {}
    for method in ("rtn", "awq"):
        quantize(tmp_path / "in", tmp_path / method, short(method, bits=8, group_size=32))
        apart[method] = np.abs(logits(tmp_path / method) - original).mean()
    assert apart["awq"] < 2 * apart["rtn"]


FAMILIES = (
    "qwen3", "mistral", "qwen2", "phi3", "gemma", "smollm3", "olmo2", "granite", "starcoder2", "cohere", "cohere2",
    "glm4", "lfm2", "qwen3_5-wide", "lfm2_moe", "mixtral", "qwen2_moe", "granitemoe", "gpt_oss", "qwen3_moe",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(tmp_path, name, monkeypatch):
    """At 8 bits nothing much changes, whatever the family does; some twins' rows hold no group, and that is said."""
    monkeypatch.setattr("ondevice.tools.quantize.writing.side_files", lambda checkpoint: {})
    ids = np.random.default_rng(0).integers(0, 60, (8, 16)).astype(np.int32)
    monkeypatch.setattr("ondevice.tools.quantize.running.samples", lambda *_: iter([ids]))
    sizes = {"hidden_size": 96, "intermediate_size": 96} | ({"moe_intermediate_size": 64} if "moe" in name else {})
    twins.make(name, **sizes).save_pretrained(tmp_path / "in")
    for method in ("rtn", "auto"):
        quantize(tmp_path / "in", tmp_path / method, Options(method, 8, 32))
        wanted, got = logits(tmp_path / "in"), logits(tmp_path / method)
        assert np.abs(wanted - got).mean() < (1 if "moe" in name else 0.1) * np.abs(wanted).mean()


def test_routers_stay_as_they_are(tmp_path):
    source = write_model(tmp_path / "in", MOE)
    quantize(source, tmp_path / "out", Options("rtn", 4, 32))
    before, after = parameters(source), parameters(tmp_path / "out")
    assert not after["layers.0.moe.router"].quantized and after["layers.0.moe.up"].quantized
    assert np.array_equal(to_float(before["layers.0.moe.router"]), to_float(after["layers.0.moe.router"]))


# ------------------------------------------------------------------------------------------------ calibrated


def divergence(path, reference, ids):
    """Mean KL from `reference` over ids [N, T]."""
    both = []
    for folder in (reference, path):
        with open_session(folder, backend="cpu", exact=True) as session:
            ops = session.backend
            found = ops.numpy(session.decoder(ops.array(ids), Step.whole(*ids.shape))).astype(np.float64)
            both.append(found - np.log(np.exp(found).sum(-1, keepdims=True)))
    return float((np.exp(both[0]) * (both[0] - both[1])).sum(-1).mean())


@pytest.mark.parametrize("hf", [LLAMA, MOE], ids=["llama", "moe"])
def test_each_method_is_nearer_than_the_one_before(tmp_path, hf):
    source, found = write_model(tmp_path / "in", hf), {}
    with open_session(source, backend="cpu", exact=True) as session:
        *_, ids = samples(session, None, 2048, 32, seed=9)
    for method in ("rtn", "search", "gptq", "auto"):
        options = short(method, bits=3, group_size=32, tokens=4096)
        quantize(source, tmp_path / method, options)
        found[method] = divergence(tmp_path / method, source, ids)
    assert found["auto"] < 0.9 * found["gptq"] < found["search"] < found["rtn"], found


@pytest.mark.parametrize("target", [{"target_bpw": 3.7}, {"target_bytes": 60_000}, {}])
def test_auto_keeps_to_its_size_and_uses_it(tmp_path, target):
    source = write_model(tmp_path / "in")
    result = quantize(source, tmp_path / "out", short(bits=5, **target))
    numbers = sum(held.size for held in map(parameters(source).__getitem__, parameters(source)))
    same = quantize(source, tmp_path / "same", Options("rtn", 5)).nbytes
    most = target.get("target_bytes", numbers * target["target_bpw"] / 8 if "target_bpw" in target else same)
    assert 0.97 * most < result.nbytes <= most
    assert result.nbytes == verify(tmp_path / "out").nbytes


def test_a_target_that_no_plan_reaches_says_what_is_nearest(tmp_path):
    with pytest.raises(BadOption, match=r"No plan takes 0\.01 MB") as caught:
        quantize(write_model(tmp_path / "in"), tmp_path / "out", short(target_bytes=10_000))
    least = float(caught.value.hint.split("--target-size ")[1].split("MB")[0]) * 1e6
    assert not (tmp_path / "out").exists()
    assert quantize(tmp_path / "in", tmp_path / "out", short(target_bytes=int(least))).nbytes <= least


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    """A model and what `auto` makes of it."""
    folder = tmp_path_factory.mktemp("unharmed")
    write_model(folder / "in")
    return folder, quantize(folder / "in", folder / "whole", short())


@pytest.mark.parametrize("stage", ["Sampling", "Measuring", "Rounding", "Writing"])
def test_killed_it_goes_on_where_it_was(tmp_path, unharmed, stage):
    (folder, whole), seen = unharmed, []
    source = folder / "in"

    def kill(event):
        if event.stage == stage and event.done > event.total / 3:
            raise Killed

    with pytest.raises(Killed):
        quantize(source, tmp_path / "out", short(), kill)
    assert os.listdir(tmp_path) == [".out.quantize"][: stage != "Sampling"]
    result = quantize(source, tmp_path / "out", short(), lambda event: seen.append(event.stage))
    assert os.listdir(tmp_path) == ["out"]
    assert result.tensors == whole.tensors
    weights = [(made / "model.safetensors").read_bytes() for made in (folder / "whole", tmp_path / "out")]
    assert weights[0] == weights[1]
    assert ("Sampling" in seen) == (stage == "Sampling") and ("Measuring" in seen) == (
        stage in ("Sampling", "Measuring")
    )


def test_what_another_work_left_is_not_gone_on_with(tmp_path, monkeypatch):
    source = write_model(tmp_path / "in")

    def kill(event):
        if event.stage == "Writing":
            raise Killed

    with pytest.raises(Killed):
        quantize(source, tmp_path / "out", short("gptq", bits=8), kill)
    quantize(source, tmp_path / "out", short("gptq", bits=2))
    quantize(source, tmp_path / "same", short("gptq", bits=2))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("same", "out")]
    assert weights[0] == weights[1]


def test_finished_stages_are_not_rounded_again(tmp_path, monkeypatch):
    source, rounded = write_model(tmp_path / "in"), []

    def kill(event):
        if event.stage == "Rounding" and event.done == 3:
            raise Killed

    with pytest.raises(Killed):
        quantize(source, tmp_path / "out", short("gptq"), kill)
    stage = Rounding.stage
    monkeypatch.setattr(Rounding, "stage", lambda self, s: rounded.append(s.prefix) or stage(self, s))
    quantize(source, tmp_path / "out", short("gptq"))
    assert rounded == ["head"]  # of embed, two layers and head


def test_an_expert_that_met_no_token_is_rounded_all_the_same_and_said(tmp_path):
    router = np.zeros((4, 64), np.float32)
    source = write_model(tmp_path / "in", MOE, layers_0_moe_router=router)  # equal scores elect the lower id
    options = short(bits=6, group_size=32)

    def kill(event):
        if event.stage == "Rounding" and event.done == 3:
            raise Killed

    with pytest.raises(Killed):
        quantize(source, tmp_path / "out", options, kill)
    result = quantize(source, tmp_path / "out", options)  # what was said of finished stages is said again
    idle = [note for note in result.notes if "experts met no calibration token" in note]
    assert len(idle) == 3 and all("model.layers.0.mlp" in note and "2 of 4" in note for note in idle)
    before, after = (to_float(parameters(tmp_path / name)["layers.0.moe.up"])[3] for name in ("in", "out"))
    assert 0 < np.abs(before - after).max() < 0.3 * np.abs(before).max()


def test_it_is_the_same_on_every_backend(tmp_path):
    source = write_model(tmp_path / "in", dtype="float32")
    for backend, module in (("cpu", "numpy"), ("cuda", "torch"), ("mlx", "mlx.core")):
        pytest.importorskip(module)
        quantize(source, tmp_path / backend, short(bits=4), backend=backend)
        assert np.abs(logits(tmp_path / backend) - logits(tmp_path / "cpu")).mean() < 0.1


# ------------------------------------------------------------------------------------------------ bad input


def test_quantized_input_is_refused_unless_asked_for(tmp_path):
    write_llama(tmp_path / "in.gguf", "Q4_1")
    with pytest.raises(BadOption, match=r"quantized already.*Q4_1") as caught:
        quantize(tmp_path / "in.gguf", tmp_path / "out", Options("rtn"))
    assert "--requantize" in caught.value.hint and os.listdir(tmp_path) == ["in.gguf"]
    quantize(tmp_path / "in.gguf", tmp_path / "out", Options("rtn", 8, 32, requantize=True))
    before, after = parameters(tmp_path / "in.gguf"), parameters(tmp_path / "out")
    step = np.abs(to_float(before["layers.0.mlp.up"])).max() / 127
    assert np.abs(to_float(before["layers.0.mlp.up"]) - to_float(after["layers.0.mlp.up"])).max() < step
    with pytest.raises(BadOption, match="8-bit"):
        quantize(tmp_path / "out", tmp_path / "again", Options("rtn"))


@pytest.mark.parametrize(("bad", "method"), [(np.nan, "rtn"), (np.inf, "rtn"), (np.nan, "auto")])
def test_numbers_that_are_none_name_their_tensor(tmp_path, bad, method):
    values = np.ones((96, 64), np.float32)
    values[50, 3] = bad
    source = write_model(tmp_path / "in", layers_1_mlp_up=values)
    with pytest.raises(BadFile, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize(source, tmp_path / "out", short(method))
    assert os.listdir(tmp_path) == ["in"]


def test_calibration_that_is_too_short(tmp_path):
    (tmp_path / "text.txt").write_text("the and")
    source = write_model(tmp_path / "in")
    with pytest.raises(BadOption, match="less than one calibration window"):
        quantize(source, tmp_path / "out", short(calibration=tmp_path / "text.txt"))
    assert sorted(os.listdir(tmp_path)) == ["in", "text.txt"]


def test_a_full_disk_leaves_no_destination_and_what_is_done(tmp_path, monkeypatch):
    source, save = write_model(tmp_path / "in"), np.savez

    def full(path, **arrays):
        if "layers.1" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OnDeviceError, match="No space left") as caught:
        quantize(source, tmp_path / "out", short("gptq"))
    assert "goes on" in caught.value.hint and sorted(os.listdir(tmp_path)) == [".out.quantize", "in"]


def test_a_destination_that_exists(tmp_path):
    source = write_model(tmp_path / "in")
    with pytest.raises(OnDeviceError, match="exists already"):
        quantize(source, source, Options("rtn"))


@pytest.mark.parametrize(
    "wrong",
    [{"method": "magic"}, {"bits": 7}, {"group_size": 48}, {"method": "rtn", "target_bpw": 4.0},
     {"mode": "fp4"}, {"mode": "mxfp4"}, {"mode": "mxfp4", "method": "rtn", "bits": 8},
     {"target_bpw": 4.0, "target_bytes": 10**6}, {"target_bpw": float("nan")}, {"target_bpw": -3.0},
     {"method": "distill", "minutes": float("nan")}, {"minutes": 0}, {"minutes": float("inf")}],
)  # fmt: skip
def test_options_that_make_no_sense(wrong):
    with pytest.raises(BadOption):
        Options(**wrong)


def test_by_the_command_line(tmp_path, capsys):
    source = write_model(tmp_path / "in")
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", str(source), str(tmp_path / "out"), "--method", "rtn", "--bits", "3", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 0 and facts["path"] == str(tmp_path / "out")
    assert facts["tensors"]["model.embed_tokens.weight"] == "3-bit (groups of 64)"
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", str(source), str(tmp_path / "out"), "--method", "rtn"])
    assert stopped.value.code == 1 and "exists already" in capsys.readouterr().err
