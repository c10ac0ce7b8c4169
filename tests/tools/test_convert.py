"""convert: the same numbers under other names, read by the programs that such folders are for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from ondevice import schemes
from ondevice.checkpoint import open_checkpoint, verify
from ondevice.errors import BadFile, BadOption, OnDeviceError, Unsupported
from ondevice.models.families import family_of
from ondevice.models.parameters import Parameters
from ondevice.registry import create_backend
from ondevice.testing.family import check_family
from ondevice.tools import convert as tool
from ondevice.tools.convert import planning
from tests.files.small_models import write_llama
from tests.models import gguf_twins, twins

WIDE = {"hidden_size": 96, "intermediate_size": 64, "head_dim": 32}  # rows of whole blocks
LEGACY = {".weight": "Q5_1"}


@pytest.fixture
def without_tokenizer(monkeypatch):
    """Twins have none."""
    monkeypatch.setattr(planning, "side_files", lambda checkpoint: {})


def run(source, dest, dtype=None, dequantize=False):
    with open_checkpoint(source) as checkpoint:
        plan = tool.plan(checkpoint, dtype, dequantize)
        tool.convert(plan, dest)
    return plan


def parameters(path) -> Parameters:
    checkpoint = open_checkpoint(path)
    family, config = family_of(checkpoint)
    return Parameters(family, family.config(config), checkpoint)


def same_numbers(one, other) -> bool:
    one, other = parameters(one), parameters(other)
    return list(one) == list(other) and all(
        np.array_equal(schemes.to_float(one[name]), schemes.to_float(other[name])) for name in one
    )


def gguf_twin(folder, name, kinds=None, **fields):
    pytest.importorskip("transformers")
    twin = twins.make(name, **fields)
    gguf_twins.write(folder / "twin.gguf", twin, kinds)
    return folder / "twin.gguf", twin


FILES = {
    "llama": {}, "qwen3": {}, "qwen3_moe": {},
    "gemma3": {"num_hidden_layers": 7, "sliding_window_pattern": 6, "query_pre_attn_scalar": 8},
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_gguf_becomes_what_transformers_had(name, tmp_path, without_tokenizer):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    source, twin = gguf_twin(tmp_path, name, **FILES[name])
    run(source, tmp_path / "out")
    assert same_numbers(source, tmp_path / "out")
    check_family(tmp_path / "out", twin, create_backend("reference", exact=True))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    ids = torch.arange(12)[None] % 61
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, twin(ids).logits, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
def test_quantized_codes_are_kept_and_mlx_lm_reads_them(name, tmp_path, without_tokenizer):
    utils = pytest.importorskip("mlx_lm.utils")
    import mlx.core as mx

    source, _ = gguf_twin(tmp_path, name, LEGACY, **WIDE, **({"moe_intermediate_size": 32} if "moe" in name else {}))
    plan = run(source, tmp_path / "out")
    assert same_numbers(source, tmp_path / "out")
    assert set(plan.formats) == {"5-bit (groups of 32)", "float32"}
    model, _ = utils.load_model(tmp_path / "out")
    model.set_dtype(mx.float32)  # else it computes in the type of the scales, float16
    ids = np.arange(1, 12)
    run(source, tmp_path / "dense", "float32", dequantize=True)
    dense, _ = utils.load_model(tmp_path / "dense")
    difference = np.abs(np.array(model(mx.array(ids[None])) - dense(mx.array(ids[None]))))
    assert difference.max() < 1e-4


def test_quantized_experts_stand_where_mlx_lm_looks(tmp_path, without_tokenizer):
    source, _ = gguf_twin(tmp_path, "qwen3_moe", LEGACY, **WIDE, moe_intermediate_size=32)
    names = {spec.name for spec in run(source, tmp_path / "out").specs}
    assert "model.layers.0.mlp.switch_mlp.up_proj.weight" in names
    names = {spec.name for spec in run(source, tmp_path / "dense", "float16", True).specs}
    assert {f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(5)} <= names


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_a_folder_is_rewritten_in_another_type(dtype, tmp_path):
    pytest.importorskip("transformers")
    twins.make("qwen3_moe").bfloat16().save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    plan = run(tmp_path / "in", tmp_path / "out", dtype)
    assert list(plan.formats) == [dtype or "bfloat16"] == [open_checkpoint(tmp_path / "out").config["dtype"]]
    assert set(open_checkpoint(tmp_path / "out").names) == set(open_checkpoint(tmp_path / "in").names)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    if dtype != "float16":
        assert same_numbers(tmp_path / "in", tmp_path / "out")


def test_a_quantized_folder_stays_or_is_dequantized(tmp_path, without_tokenizer):
    source, _ = gguf_twin(tmp_path, "llama", LEGACY, **WIDE)
    run(source, tmp_path / "first")
    run(tmp_path / "first", tmp_path / "second")
    run(tmp_path / "second", tmp_path / "dense", "float32", dequantize=True)
    assert same_numbers(source, tmp_path / "second") and same_numbers(source, tmp_path / "dense")
    assert "quantization" not in open_checkpoint(tmp_path / "dense").config
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


MIXED = {"": (4, 32), "q_proj": (3, 64), "down_proj": (8, 64), "embed_tokens": (6, 32), "v_proj": (5, 32)}


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_every_tensor_with_bits_of_its_own(name, tmp_path, quantize_folder):
    """mlx-lm on the quantized folder and transformers on the one made --to hf say the same, and so do we."""
    torch, utils = pytest.importorskip("torch"), pytest.importorskip("mlx_lm.utils")
    transformers = pytest.importorskip("transformers")
    import mlx.core as mx

    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 32}
    twins.make(name, **sizes).save_pretrained(tmp_path / "dense")
    quantize_folder(tmp_path / "dense", tmp_path / "mixed", MIXED)
    for to, dtype in (("mlx", None), ("hf", "float32")):
        args = ["--to", to, *(["--dtype", dtype] if dtype else [])]
        assert ondevice("convert", tmp_path / "mixed", tmp_path / to, *args).returncode == 0
    assert same_numbers(tmp_path / "mixed", tmp_path / "mlx") and same_numbers(tmp_path / "mixed", tmp_path / "hf")
    ids = np.arange(1, 12)[None]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.dtype == torch.float32
    model, _ = utils.load_model(tmp_path / "mlx")
    model.set_dtype(mx.float32)
    with torch.no_grad():
        wanted = loaded(torch.tensor(ids)).logits.numpy()
    assert np.abs(np.array(model(mx.array(ids))) - wanted).max() < 1e-4 * np.abs(wanted).max()
    check_family(tmp_path / "mlx", loaded, create_backend("reference", exact=True))


def test_to_hf_leaves_nothing_quantized(tmp_path, without_tokenizer):
    source, _ = gguf_twin(tmp_path, "llama", LEGACY, **WIDE)
    with open_checkpoint(source) as checkpoint:
        assert set(tool.plan_hf(checkpoint).formats) == {"bfloat16"}
        assert set(tool.plan_hf(checkpoint, "float16").formats) == {"float16"}
        tool.convert(tool.plan_hf(checkpoint, "float32"), tmp_path / "dense")
    with open_checkpoint(tmp_path / "dense") as checkpoint:
        assert set(tool.plan_hf(checkpoint).formats) == {"float32"}


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5", "gpt2"])
def test_transformers_reads_what_is_laid_out_otherwise_in_files(name, tmp_path, without_tokenizer):
    """A convolution's kernels have an axis more there; GPT-2's matrices lie the other way round."""
    transformers = pytest.importorskip("transformers")
    twins.make(name).save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out", "float32")
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    check_family(tmp_path / "in", loaded.eval())


# ------------------------------------------------------------------------------------------------ K-quants


def k_quant_file(folder, kind="Q4_K"):
    write_llama(folder / "k.gguf", kind)
    return folder / "k.gguf"


def test_k_quants_need_a_type(tmp_path):
    source = k_quant_file(tmp_path)
    with pytest.raises(Unsupported, match="8 as Q4_K") as caught:
        run(source, tmp_path / "out")
    assert "--dtype bfloat16" in caught.value.hint and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_go_to_that_type(kind, tmp_path):
    source = k_quant_file(tmp_path, kind)
    run(source, tmp_path / "out", "float32")
    assert same_numbers(source, tmp_path / "out")


def test_a_ggufs_settings_become_files(tmp_path):
    run(k_quant_file(tmp_path), tmp_path / "out", "float16")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 3, "temperature": 0.6, "do_sample": True}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16" and config["model_type"] == "llama"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


# ------------------------------------------------------------------------------------------------ refusals, the plan


def test_dequantize_needs_a_type(tmp_path):
    with pytest.raises(BadOption, match="needs a type"):
        run(k_quant_file(tmp_path), tmp_path / "out", dequantize=True)
    with pytest.raises(BadOption, match="'int4'"):
        run(k_quant_file(tmp_path), tmp_path / "out", "int4")


def test_a_gguf_without_tokenizer_is_refused(tmp_path):
    source, _ = gguf_twin(tmp_path, "llama")
    with pytest.raises(BadFile, match="no tokenizer"):
        run(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["twin.gguf"]


def test_an_existing_destination_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OnDeviceError, match="exists already"):
        run(k_quant_file(tmp_path), tmp_path / "out", "float16")


def test_the_plan_is_what_happens(tmp_path):
    source = k_quant_file(tmp_path)
    with open_checkpoint(source) as checkpoint:
        plan = tool.plan(checkpoint, "float16")
        expected = tool.estimate(plan, tmp_path / "out")
        assert os.listdir(tmp_path) == ["k.gguf"] and expected.free_bytes > 0 and 0 < expected.seconds < 60
        tool.convert(plan, tmp_path / "out")
    made = verify(tmp_path / "out")
    assert (made.nbytes, made.tensors, made.formats) == (plan.nbytes, len(plan.specs), plan.formats)


def test_a_plan_for_nowhere_is_refused(tmp_path):
    with open_checkpoint(k_quant_file(tmp_path)) as checkpoint, pytest.raises(OnDeviceError, match="no folder"):
        tool.estimate(tool.plan(checkpoint, "float16"), tmp_path / "a" / "out")


# ------------------------------------------------------------------------------------------------ the real model


def ondevice(*args):
    command = [sys.executable, "-m", "ondevice", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_smollm2_by_the_command_line(smollm2_gguf, tmp_path):
    """transformers on the dequantized folder and mlx-lm on the quantized one say the same."""
    torch, utils = pytest.importorskip("torch"), pytest.importorskip("mlx_lm.utils")
    transformers = pytest.importorskip("transformers")
    import mlx.core as mx

    planned = ondevice("convert", smollm2_gguf, tmp_path / "mlx", "--plan", "--json")
    assert planned.returncode == 0, planned.stderr
    assert os.listdir(tmp_path) == []
    done = ondevice("convert", smollm2_gguf, tmp_path / "mlx", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(planned.stdout)["bytes"] == json.loads(done.stdout)["bytes"] == verify(tmp_path / "mlx").nbytes
    assert ondevice("convert", smollm2_gguf, tmp_path / "hf", "--dtype", "float32", "--dequantize").returncode == 0

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "The quick brown fox 1234"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits.numpy()
    quantized, _ = utils.load_model(tmp_path / "mlx")
    quantized.set_dtype(mx.float32)
    got = np.array(quantized(mx.array([ids])))
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_memory_holds_about_one_tensor(smollm2_gguf, tmp_path):
    with open_checkpoint(smollm2_gguf) as checkpoint:
        plan = tool.plan(checkpoint, "bfloat16", dequantize=True)
        largest = max(spec.nbytes for spec in plan.specs)
        tracemalloc.start()
        try:
            tool.convert(plan, tmp_path / "out")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 2.5 * largest < 0.6 * plan.nbytes


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_leaves_nothing(smollm2_gguf, tmp_path, sent, status):
    command = [sys.executable, "-m", "ondevice", "convert", smollm2_gguf, tmp_path / "out", "--dtype", "float32"]
    running = subprocess.Popen([*map(str, command), "--dequantize"], stderr=subprocess.PIPE, text=True)
    while running.poll() is None and not os.listdir(tmp_path):
        time.sleep(0.005)
    running.send_signal(sent)
    said = running.communicate(timeout=60)[1]
    assert (running.returncode, os.listdir(tmp_path)) == (status, []), said
    assert "Traceback" not in said


def test_the_command_line_refuses_in_two_lines(tmp_path):
    source = k_quant_file(tmp_path)
    wrong = [["--type", "q8_0"], ["--to", "gguf"], ["--to", "gguf", "--dtype", "float32"], ["--to", "onnx"]]
    for args, status in (((), 1), (("--dequantize",), 2), (("--dtype", "int3"), 2), *((args, 2) for args in wrong)):
        done = ondevice("convert", source, tmp_path / "out", *args)
        assert done.returncode == status and done.stdout == "" and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
