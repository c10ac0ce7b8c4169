"""quantize: bit for bit what MLX makes with --method rtn; folders that our backends and mlx-lm read; bad input."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from small_models import write_llama
from wide_models import LLAMA, MOE, parameters, write_model

from ondevice.backends.base import Step
from ondevice.cli import main
from ondevice.errors import BadFile, BadOption, OnDeviceError
from ondevice.runtime.session import open_session
from ondevice.schemes import to_float
from ondevice.tensors import Affine, floats
from ondevice.tools.quantize import Options, quantize

IDS = np.arange(3, 23, dtype=np.int32)[None]


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


@pytest.mark.parametrize("hf", [LLAMA, LLAMA | {"tie_word_embeddings": False}, MOE], ids=["tied", "untied", "moe"])
@pytest.mark.parametrize("method", ["rtn"])
def test_what_is_written_runs_everywhere(tmp_path, hf, method):
    quantize(write_model(tmp_path / "in", hf, "float32"), tmp_path / "out", Options(method, 8, 32))
    wanted = logits(tmp_path / "out")
    assert np.abs(wanted - logits(tmp_path / "in")).mean() < 0.1 * np.abs(wanted).mean()
    for backend, module in (("cpu", "numpy"), ("cuda", "torch"), ("mlx", "mlx.core")):
        pytest.importorskip(module)
        assert np.abs(logits(tmp_path / "out", backend) - wanted).max() < 1e-3 * np.abs(wanted).max()
    utils, mx = pytest.importorskip("mlx_lm.utils"), pytest.importorskip("mlx.core")
    theirs = np.array(utils.load_model(tmp_path / "out")[0](mx.array(IDS)))
    assert np.abs(theirs - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_routers_stay_as_they_are(tmp_path):
    source = write_model(tmp_path / "in", MOE)
    quantize(source, tmp_path / "out", Options("rtn", 4, 32))
    before, after = parameters(source), parameters(tmp_path / "out")
    assert not after["layers.0.moe.router"].quantized and after["layers.0.moe.up"].quantized
    assert np.array_equal(to_float(before["layers.0.moe.router"]), to_float(after["layers.0.moe.router"]))


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


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_name_their_tensor(tmp_path, bad):
    values = np.ones((96, 64), np.float32)
    values[50, 3] = bad
    source = write_model(tmp_path / "in", layers_1_mlp_up=values)
    with pytest.raises(BadFile, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize(source, tmp_path / "out", Options("rtn"))
    assert os.listdir(tmp_path) == ["in"]


def test_a_destination_that_exists(tmp_path):
    source = write_model(tmp_path / "in")
    with pytest.raises(OnDeviceError, match="exists already"):
        quantize(source, source, Options("rtn"))


@pytest.mark.parametrize(
    "wrong",
    [{"method": "magic"}, {"bits": 7}, {"group_size": 48}, {"method": "rtn", "target_bpw": 4.0},
     {"target_bpw": 4.0, "target_bytes": 10**6}],
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
