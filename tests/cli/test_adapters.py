"""--adapter, /adapter, generate --compare, fuse and convert of adapters, on the command line, over a tiny model."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.cli.test_chat import piped
from tests.cli.test_generate import generate, run
from tests.tiny_model import HIDDEN, LAYERS, WIDTH, write_tiny_model

SHAPES = {"self_attn.q_proj": (WIDTH, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN)}


def write_adapter(folder, seed):
    """PEFT's format; strong enough that another text comes out."""
    folder.mkdir()
    draw = np.random.default_rng(seed)
    tensors = {}
    for i in range(LAYERS):
        for module, (outputs, inputs) in SHAPES.items():
            name = f"base_model.model.model.layers.{i}.{module}"
            tensors[f"{name}.lora_A.weight"] = draw.normal(size=(2, inputs)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = draw.normal(size=(outputs, 2)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapters") / "one: first", 1)


ASK = ("--prompt", "the end", "--max-tokens", "8", "--temperature", "0", "--ignore-eos")


def test_an_adapter_changes_the_answer_and_its_weight_how_much(tiny, adapter):
    plain, none, half, whole = (
        generate(tiny, *ASK, *options)["token_ids"]
        for options in ((), ("--adapter", f"{adapter}:0"), ("--adapter", f"{adapter}:0.5"), ("--adapter", adapter))
    )
    assert plain == none and plain != whole
    twice = generate(tiny, *ASK, "--adapter", f"{adapter}:0.5", "--adapter", f"{adapter}:0.5")
    assert twice["token_ids"] == whole
    assert twice["adapters"] == [{"path": adapter, "weight": 0.5}] * 2
    assert isinstance(half, list)


def test_both_answers_side_by_side(tiny, adapter):
    both = generate(tiny, *ASK, "--adapter", adapter, "--compare")
    assert both["base"]["token_ids"] == generate(tiny, *ASK)["token_ids"]
    assert both["tuned"]["token_ids"] == generate(tiny, *ASK, "--adapter", adapter)["token_ids"]
    first = both["first_difference"]
    assert both["base"]["token_ids"][:first] == both["tuned"]["token_ids"][:first]
    assert both["base"]["token_ids"][first] != both["tuned"]["token_ids"][first]
    shown = run("generate", tiny, "--backend", "cpu", *ASK, "--adapter", adapter, "--compare")
    assert shown.stdout == f"base:\n{both['base']['text']}\n\nwith adapter:\n{both['tuned']['text']}\n\n"
    assert "base: prompt" in shown.stderr and "with adapter: prompt" in shown.stderr


def test_what_compare_needs(tiny):
    done = run("generate", tiny, *ASK, "--compare")
    assert done.returncode == 2 and "--adapter" in done.stderr


@pytest.mark.parametrize("weight", ["nan", "inf"])
def test_weights_that_make_no_sense(tiny, adapter, weight):
    done = run("generate", tiny, *ASK, "--adapter", f"{adapter}:{weight}")
    assert done.returncode == 2 and "makes no sense" in done.stderr


def test_an_adapter_that_does_not_fit(tiny, adapter, tmp_path):
    other = str(write_tiny_model(tmp_path / "other"))
    config = json.loads((tmp_path / "other" / "config.json").read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    done = run("generate", other, *ASK, "--adapter", adapter)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 2
    done = run("generate", tiny, *ASK, "--adapter", str(tmp_path / "nothing"))
    assert done.returncode == 1 and "no adapter folder" in done.stderr


def test_adapters_change_within_a_chat(tiny, adapter):
    """The model says the same as before once they are off; what is attached is told."""
    ask = "the end\n"
    plain = piped(tiny, ask, "--max-tokens", "6").stdout
    tuned = piped(tiny, ask, "--max-tokens", "6", "--adapter", adapter).stdout
    assert plain != tuned
    talk = f'{ask}/clear\n/adapter "{adapter}"\n{ask}/clear\n/adapter\n/adapter off\n{ask}/adapter\n'
    done = piped(tiny, talk, "--max-tokens", "6")
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain + tuned + plain
    assert done.stderr.count(f"(Adapter: {adapter}, ") == 2 and done.stderr.count("(No adapter") == 2


def test_a_wrong_adapter_ends_a_pipe_in_two_lines(tiny, tmp_path):
    done = piped(tiny, f"/adapter {tmp_path / 'nothing'}\n")
    assert done.returncode == 1 and "no adapter folder" in done.stderr


def test_bench_takes_adapters(tiny, adapter):
    numbers = ("--prompt-tokens", "8", "--generate-tokens", "4", "--repeat", "1", "--json")
    done = run("bench", tiny, "--backend", "cpu", "--adapter", adapter, *numbers)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapters"] == [{"path": adapter, "weight": 1.0}]
    done = run("bench", tiny, "--random-weights", "--adapter", adapter, *numbers)
    assert done.returncode == 2 and "random weights" in done.stderr


def test_a_fused_model_answers_as_both_did(tiny, adapter, tmp_path):
    done = run("fuse", tiny, adapter, str(tmp_path / "fused"), "--tokens", "32", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["drift"]["mean"] < 1e-5 < facts["effect"]["mean"] and facts["touched"] == 2 * LAYERS
    told = generate(str(tmp_path / "fused"), *ASK, "--exact")["token_ids"]
    assert told == generate(tiny, *ASK, "--adapter", adapter, "--exact")["token_ids"]
    again = run("fuse", tiny, adapter, str(tmp_path / "fused"))
    assert again.returncode == 1 and "exists already" in again.stderr
    shown = run("fuse", tiny, f"{adapter}:0.5", adapter, str(tmp_path / "two"), "--tokens", "32", "--dtype", "float32")
    assert shown.returncode == 0 and "of the effect" in shown.stdout, shown.stderr


def test_adapters_convert_both_ways(tiny, adapter, tmp_path):
    there = run("convert", adapter, str(tmp_path / "mlx"), "--to", "mlx", "--model", tiny)
    assert there.returncode == 0, there.stderr
    assert (tmp_path / "mlx" / "adapters.safetensors").is_file()
    back = run("convert", str(tmp_path / "mlx"), str(tmp_path / "peft"), "--model", tiny, "--json")
    assert json.loads(back.stdout)["to"] == "peft"
    wanted = generate(tiny, *ASK, "--adapter", adapter)["token_ids"]
    for folder in ("mlx", "peft"):
        assert generate(tiny, *ASK, "--adapter", str(tmp_path / folder))["token_ids"] == wanted


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "does not name the model"),
        (("--to", "gguf"), "cannot go to gguf"),
        (("--dtype", "float16"), "for models"),
    ],
)
def test_conversions_that_make_no_sense(adapter, tmp_path, options, told):
    done = run("convert", adapter, str(tmp_path / "made"), *options)
    assert done.returncode == 2 and told in done.stderr and not (tmp_path / "made").exists()
