"""What bench says: every length and depth asked for, and the work of a token beside counts made by hand."""

import json

import pytest
from click.testing import CliRunner

from ondevice.backends.reference import create
from ondevice.cli.bench import command
from ondevice.errors import BadOption
from ondevice.models.config import ModelConfig
from ondevice.models.decoder import Decoder
from ondevice.models.random import blank_weights, random_weights
from ondevice.runtime.bench import BenchOptions, Measured, bench, work
from ondevice.runtime.engine import Engine
from ondevice.runtime.limits import measure
from tests.tiny_model import write_tiny_model

D, F, V, LAYERS, HEADS, KV = 64, 96, 50, 3, 4, 2
HF = {
    "model_type": "llama", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "vocab_size": V,
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "max_position_embeddings": 256, "hidden_act": "silu",
}  # fmt: skip
MATRICES = LAYERS * (2 * D * D + 2 * D * D * KV // HEADS + 3 * D * F)  # q and o, k and v, the MLP's three


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [32, 16])
def test_the_work_of_a_token(tied, bits):
    config = ModelConfig.llama_like({**HF, "tie_word_embeddings": tied})
    found = work(config, blank_weights(config, bits), context_bytes=100.0)
    norms = (2 * LAYERS + 1) * D * 4
    assert found.weight_bytes == (MATRICES + V * D) * bits // 8 + norms  # one embedding counts: as the head
    assert found.weight_operations == 2 * (MATRICES + V * D)
    assert found.bytes_at(3) - found.bytes_at(0) == 300.0
    assert found.operations_at(1) - found.operations_at(0) == LAYERS * 2 * HEADS * 2 * (D // HEADS)


def test_experts_count_as_far_as_they_are_used():
    from ondevice.models.families.qwen3_moe import config as qwen3_moe

    hf = {**HF, "num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16, "tie_word_embeddings": True}
    few, many = (qwen3_moe({**hf, "num_experts_per_tok": k}) for k in (2, 4))
    few, many = (work(config, blank_weights(config, 16), 0).weight_operations for config in (few, many))
    assert many - few == LAYERS * 2 * 2 * (3 * D * 32)


def test_every_length_and_depth_is_measured():
    ops, config = create(), ModelConfig.llama_like(HF)
    engine = Engine(Decoder(config, ops, random_weights(config, ops, 16)), 64)
    options = BenchOptions((3, 5), (0, 7), generate_tokens=2, repeat=2)
    *repeats, measured = bench(engine, options)
    assert isinstance(measured, Measured) and measured.repeats == tuple(repeats) and len(repeats) == 2
    assert all(set(r.prefill) == {3, 5} and set(r.decode) == {0, 7} for r in repeats)
    assert min(measured.prefill(5) + measured.decode(7)) > 0


def test_what_does_not_fit_is_said():
    ops, config = create(), ModelConfig.llama_like(HF)
    engine = Engine(Decoder(config, ops, random_weights(config, ops, 16)), 8)
    with pytest.raises(BadOption, match="context of 11"):
        next(bench(engine, BenchOptions((3,), (8,), generate_tokens=2)))


def test_limits_are_positive():
    assert min(vars(measure(2)).values()) > 0


def test_json_of_several(tmp_path):
    model = str(write_tiny_model(tmp_path / "tiny"))
    few = ["--prompt-tokens", "4,9", "--depth", "0,6", "--generate-tokens", "3", "--repeat", "1", "--json"]
    done = CliRunner().invoke(command, [model, "--backend", "reference,cpu", *few, "--plot", str(tmp_path / "a.png")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [r["backend"] for r in found] == ["reference", "cpu"]
    for r in found:
        assert [p["tokens"] for p in r["prefill"]] == [4, 9] and [d["depth"] for d in r["decode"]] == [0, 6]
        assert r["prefill_tokens_per_second"] == r["prefill"][0]["tokens_per_second"]
        assert r["decode"][1]["bytes_per_second"] > 0 and r["limits"]["bytes_per_second"] > 0
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("wrong", ["", "a", "3,", "0", "3,-1"])
def test_numbers_that_make_no_sense(wrong):
    done = CliRunner().invoke(command, ["m", "--prompt-tokens", wrong])
    assert done.exit_code == 2 and "with commas between" in done.output
