"""convert --to gguf: what llama.cpp's converter writes, codes kept, the tokenizer's ids, losses as they are."""

from __future__ import annotations

import json
import shutil

import gguf
import numpy as np
import pytest

from ondevice import schemes
from ondevice.checkpoint import open_checkpoint
from ondevice.errors import BadFile, BadOption, OnDeviceError, Unsupported
from ondevice.registry import create_backend
from ondevice.schemes import quantize_affine
from ondevice.tensors import Blocks
from ondevice.testing.family import check_family, logits_of
from ondevice.tools import convert as tool
from ondevice.tools.convert import to_gguf
from ondevice.tools.convert.blocks import keeps_codes, nearest, to_type
from tests.files.small_models import random_blocks, write_llama
from tests.models import gguf_twins, twins
from tests.tiny_model import write_tiny_model

WIDE = {"hidden_size": 96, "intermediate_size": 64, "head_dim": 32}  # rows of whole blocks


@pytest.fixture
def without_tokenizer(monkeypatch):
    """Twins have none."""
    monkeypatch.setattr(to_gguf, "gguf_tokenizer", lambda folder, vocab: {})


def run(source, dest, kind=None):
    with open_checkpoint(source) as checkpoint:
        plan = tool.plan_gguf(checkpoint, kind)
        tool.convert_gguf(plan, dest)
    return plan


def contents(path):
    """Metadata and tensors as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return metadata, {t.name: (t.tensor_type.name, tuple(t.shape), t.data.tobytes()) for t in reader.tensors}


LLAMA3 = twins.LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
TWINS = {
    "llama": {}, "llama-biases": {}, "llama-linear": {}, "llama-rope3": {"rope_parameters": LLAMA3}, "qwen3": {},
    "qwen3_moe": {}, "lfm2": {},
    "gemma3": {"num_hidden_layers": 7, "sliding_window_pattern": 6, "query_pre_attn_scalar": 8},
}  # fmt: skip


EVEN = {"linear_value_head_dim": 8}  # llama.cpp has one size for the keys and values of a memory
PHIMOE = {"router_jitter_noise": 0.01, "lm_head_bias": True}
MORE = {  # Mistral is one of llama.cpp's Llamas
    "mistral-full": {}, "smollm3": {}, "granite": {}, "stablelm": {}, "cohere2": {}, "glm4": {},
    "gemma2": {"query_pre_attn_scalar": 8}, "gpt_neox": {}, "phi3": {}, "mixtral": {}, "qwen2_moe": {},
    "granitemoe": {}, "olmo": {}, "nemotron": {}, "phi": {}, "glm4_moe": {}, "granite4": {}, "ernie4_5_moe": {},
    "internlm3": {}, "lfm2_moe": {"routed_scaling_factor": 1.0}, "qwen3_5": EVEN, "qwen3_5_moe": EVEN,
    "qwen3_next": {"linear_key_head_dim": 4}, "phimoe": PHIMOE, "helium": {}, "phi3-long": {},
}  # fmt: skip
WIDTH = {"hidden_size": 48}  # where llama.cpp wants the heads to share the width
SHARED = {"lfm2": WIDTH, "lfm2_moe": WIDTH, "nemotron": WIDTH}


@pytest.mark.parametrize("name", TWINS)
def test_a_folder_becomes_what_llama_cpps_converter_writes(name, tmp_path, without_tokenizer):
    twin = twins.make(name, **TWINS[name])
    twin.save_pretrained(tmp_path / "in")
    gguf_twins.write(tmp_path / "wanted.gguf", twin)
    run(tmp_path / "in", tmp_path / "out.gguf")
    (wanted, tensors), (found, written) = contents(tmp_path / "wanted.gguf"), contents(tmp_path / "out.gguf")
    assert written.keys() == tensors.keys()
    for tensor, (kind, shape, raw) in tensors.items():
        values, other = (np.frombuffer(data, np.float32) for data in (raw, written[tensor][2]))
        assert (kind, shape) == written[tensor][:2]
        exact = tensor != "rope_freqs.weight"
        assert np.array_equal(values, other) if exact else np.allclose(values, other, rtol=1e-5), tensor
    assert _same(wanted, found)
    check_family(tmp_path / "out.gguf", twin, create_backend("reference", exact=True))


@pytest.mark.parametrize("name", MORE)
def test_other_families_come_back_the_same(name, tmp_path, without_tokenizer):
    twin = twins.make(name, **MORE[name])
    twin.save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out.gguf")
    check_family(tmp_path / "out.gguf", twin, create_backend("reference", exact=True))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("qwen3_moe-sums", "a qwen3moe would differ in feed_forward.rule.renormalise = False"),
        ("gemma-gelu", "a gemma would differ in output"),
        ("helium-biases", r"a llama would differ in mixer\.bias = True"),
        ("qwen2-dynamic", "by the rule 'dynamic'"),
        ("qwen3_5", "one size for a memory's keys and values, which here are 8 and 4"),
        ("lfm2_moe", "a lfm2moe would differ in feed_forward.rule.scale = 1.5"),
    ],
)
def test_what_llama_cpp_has_no_place_for_is_refused(name, says, tmp_path, without_tokenizer):
    twins.make(name).save_pretrained(tmp_path / "in")
    with pytest.raises(Unsupported, match=says):
        run(tmp_path / "in", tmp_path / "out.gguf")


def test_a_window_that_llama_cpp_does_not_heed_is_said(tmp_path, without_tokenizer):
    for name in ("mistral", "gemma3"):
        twins.make(name, query_pre_attn_scalar=8, sliding_window_pattern=6).save_pretrained(tmp_path / name)
    (said,) = run(tmp_path / "mistral", tmp_path / "mistral.gguf").notes
    assert "sliding window of 5 tokens in the architecture llama" in said
    assert run(tmp_path / "gemma3", tmp_path / "gemma3.gguf").notes == ()


def test_what_llama_cpp_computes_otherwise_is_said(tmp_path, without_tokenizer):
    twins.make("phimoe", router_jitter_noise=0.01).save_pretrained(tmp_path / "in")
    (said,) = run(tmp_path / "in", tmp_path / "out.gguf").notes
    assert said.startswith("llama.cpp weighs PhiMoE's experts by a softmax")


def _same(wanted, found):
    for key, value in wanted.items():
        assert type(found[key]) is type(value), key
        assert found[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
    return True


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_to_a_folder_and_back_keeps_every_bit(kind, tmp_path):
    write_llama(tmp_path / "in.gguf", kind)
    with open_checkpoint(tmp_path / "in.gguf") as checkpoint:
        tool.convert(tool.plan(checkpoint), tmp_path / "folder")
    plan = run(tmp_path / "folder", tmp_path / "out.gguf")
    (wanted, tensors), (found, written) = contents(tmp_path / "in.gguf"), contents(tmp_path / "out.gguf")
    assert written == tensors and plan.loss.kept and plan.loss.error == 0
    wanted.pop("tokenizer.ggml.pre")  # several rules cut alike what four tokens can spell
    assert _same({k: v for k, v in wanted.items() if not k.startswith("general.")}, found)
    assert found["general.sampling.temp"] == pytest.approx(0.6)


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_a_gguf_is_rewritten_as_it_is(kind, tmp_path):
    write_llama(tmp_path / "in.gguf", kind)
    run(tmp_path / "in.gguf", tmp_path / "out.gguf")
    (wanted, tensors), (found, written) = contents(tmp_path / "in.gguf"), contents(tmp_path / "out.gguf")
    assert written == tensors and _same(wanted, found)


# ------------------------------------------------------------------------------------------------ types


def affine(bits, group, dtype="float16", columns=256, seed=0):
    return quantize_affine(np.random.default_rng(seed).normal(size=(6, columns)).astype(np.float32), bits, group, dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_codes_of_up_to_five_bits_are_kept(bits, group, dtype):
    tensor = affine(bits, group, dtype)
    form = nearest(tensor)
    made, loss = to_type(tensor, form)
    assert form == Blocks("Q5_1" if bits == 5 else "Q4_1") and loss.kept
    codes, scales, _, _ = schemes.parts(tensor)
    kept, own, _, _ = schemes.parts(made)
    assert np.array_equal(codes, kept)
    assert np.allclose(np.repeat(scales, group // 32, -1), own, rtol=2**-10)
    assert loss.error == 0 if dtype == "float16" else loss.relative < 1e-3


@pytest.mark.parametrize(("bits", "group"), [(6, 32), (8, 32), (8, 64)])
def test_other_codes_are_rounded_and_the_loss_is_true(bits, group):
    tensor = affine(bits, group)
    made, loss = to_type(tensor, nearest(tensor))
    one, other = schemes.to_float(tensor), schemes.to_float(made)
    assert made.format == Blocks("Q8_0") and not loss.kept
    assert loss.relative == pytest.approx(np.linalg.norm(one - other) / np.linalg.norm(one), rel=1e-5)
    assert 0 < loss.relative < 0.01


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_a_minimum_that_is_no_multiple_is_not_dropped(kind):
    blocks = schemes.to_affine(schemes.Tensor((3, 64), Blocks(kind), {"weight": random_blocks(kind, 3, 64)}))
    assert keeps_codes(blocks, kind)
    blocks.parts["biases"][1, 1] *= np.float16(1.01)
    assert not keeps_codes(blocks, kind)


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_dense_matrices_are_quantized_as_the_gguf_package_does(kind, tmp_path, without_tokenizer):
    twin = twins.make("llama", **WIDE)
    twin.save_pretrained(tmp_path / "in")
    gguf_twins.write(tmp_path / "wanted.gguf", twin, {".weight": kind.upper()})
    plan = run(tmp_path / "in", tmp_path / "out.gguf", kind)
    tensors, written = contents(tmp_path / "wanted.gguf")[1], contents(tmp_path / "out.gguf")[1]
    assert written == tensors
    assert 0.001 < plan.loss.relative < 0.2 and not plan.loss.kept


@pytest.mark.parametrize(("kind", "name"), [("f32", "F32"), ("f16", "F16"), ("BF16", "BF16"), (None, "BF16")])
def test_dense_types(kind, name, tmp_path, without_tokenizer):
    twin = twins.make("qwen3", **WIDE).bfloat16()
    twin.save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out.gguf", kind)
    kinds = {tensor: form[0] for tensor, form in contents(tmp_path / "out.gguf")[1].items()}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == name
    assert kinds["blk.0.attn_q_norm.weight"] == kinds["output_norm.weight"] == "F32"


def test_rows_that_blocks_do_not_fill_go_to_float16(tmp_path, without_tokenizer):
    twins.make("llama").save_pretrained(tmp_path / "in")  # rows of 36
    assert {"float16", "float32"} == set(run(tmp_path / "in", tmp_path / "out.gguf", "q8_0").formats)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("kind", "says"), [("q4_k_m", "llama-quantize"), ("int4", "Choose from")])
def test_types_that_cannot_be_written(kind, says, tmp_path):
    write_llama(tmp_path / "in.gguf", "Q8_0")
    with pytest.raises(BadOption) as caught:
        run(tmp_path / "in.gguf", tmp_path / "out.gguf", kind)
    assert says in caught.value.hint and not (tmp_path / "out.gguf").exists()


def test_numbers_that_no_type_holds(tmp_path, without_tokenizer):
    twin = twins.make("llama", **WIDE)
    twin.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e6
    twin.save_pretrained(tmp_path / "large")
    with pytest.raises(Unsupported, match=r"blk\.1\.ffn_up\.weight .* too large for float16"):
        run(tmp_path / "large", tmp_path / "out.gguf", "f16")
    twin.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    twin.save_pretrained(tmp_path / "nan")
    with pytest.raises(BadFile, match=r"blk\.1\.ffn_up\.weight .* not finite"):
        run(tmp_path / "nan", tmp_path / "out.gguf", "q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "nan"]


def test_an_existing_file_stays(tmp_path):
    write_llama(tmp_path / "in.gguf", "Q8_0")
    with pytest.raises(OnDeviceError, match="exists already"):
        run(tmp_path / "in.gguf", tmp_path / "in.gguf")


# ------------------------------------------------------------------------------------------------ the tokenizer, peers


def test_a_folder_with_its_tokenizer(tmp_path):
    folder = write_tiny_model(tmp_path / "in", do_sample=True, temperature=0.5, top_k=20)
    run(folder, tmp_path / "out.gguf")
    metadata = contents(tmp_path / "out.gguf")[0]
    assert metadata["tokenizer.ggml.pre"] == "gpt-2" and "<|im_start|>" in metadata["tokenizer.chat_template"]
    assert (metadata["general.sampling.top_k"], metadata["general.sampling.temp"]) == (20, 0.5)
    with open_checkpoint(tmp_path / "out.gguf") as checkpoint:
        tool.convert(tool.plan(checkpoint), tmp_path / "back")
    with open_checkpoint(folder) as one, open_checkpoint(tmp_path / "back") as other:
        for name in one.names:
            assert np.array_equal(schemes.to_float(one[name]), schemes.to_float(other[name]))
    kept = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert (kept["top_k"], kept["temperature"], kept["do_sample"]) == (20, 0.5, True)


def test_more_tokens_than_the_model_knows(tmp_path):
    folder = write_tiny_model(tmp_path / "in")
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described["added_tokens_decoder"] = {"200": {"content": "<extra>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    run(folder, tmp_path / "out.gguf")
    with open_checkpoint(tmp_path / "out.gguf") as checkpoint:
        tokens = checkpoint.metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == 106 and "<extra>" not in tokens


@pytest.mark.parametrize("name", sorted((TWINS | MORE).keys() - {"phimoe"}))  # which it computes otherwise
def test_llama_cpp_computes_the_same(name, tmp_path, monkeypatch):
    llama_cpp = pytest.importorskip("llama_cpp")
    monkeypatch.setattr(to_gguf, "gguf_tokenizer", lambda folder, vocab: {"tokenizer.ggml.model": "none"})
    twin = twins.make(name, **(TWINS | MORE)[name] | SHARED.get(name, {}))
    twin.save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "out.gguf")
    model = llama_cpp.Llama(str(tmp_path / "out.gguf"), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0)
    ids = np.arange(1, 25)[: getattr(twin.config, "sliding_window", None) if name == "phi3" else None]
    model.eval(ids.tolist())
    wanted = logits_of(twin, ids[None])[0]
    bound = 1e-3 if "gemma" in name or name in ("gpt_neox", "phi") else 1e-4  # llama.cpp's GELU is a table of float16
    assert np.abs(model.scores[: len(ids)] - wanted).max() < bound * np.abs(wanted).max()


def test_llama_cpp_gives_the_same_greedy_text(smollm2_gguf, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    with open_checkpoint(smollm2_gguf) as checkpoint:
        tool.convert(tool.plan(checkpoint), tmp_path / "folder")
    run(tmp_path / "folder", tmp_path / "back.gguf")
    texts = []
    for path in (smollm2_gguf, tmp_path / "back.gguf"):
        model = llama_cpp.Llama(str(path), n_ctx=256, verbose=False)
        texts.append(model("The ocean is", max_tokens=24, temperature=0.0)["choices"][0]["text"])
    assert texts[0] == texts[1] and len(texts[0]) > 20


def test_smollm2_to_a_folder_and_back(smollm2_gguf, tmp_path):
    with open_checkpoint(smollm2_gguf) as checkpoint:
        tool.convert(tool.plan(checkpoint), tmp_path / "folder")
    run(tmp_path / "folder", tmp_path / "back.gguf")
    shutil.rmtree(tmp_path / "folder")
    with open_checkpoint(smollm2_gguf) as one, open_checkpoint(tmp_path / "back.gguf") as other:
        assert set(one.names) == set(other.names)
        for name in one.names:
            assert one[name].format == other[name].format
            assert np.array_equal(one[name].parts["weight"], other[name].parts["weight"])
        keys = [key for key in one.metadata if not key.startswith("general.")]
        assert keys and all(one.metadata[key] == other.metadata[key] for key in keys)
