"""--kv-bits: keys and values in fewer bits, from the command line to what memory is planned."""

import json

import pytest
from click.testing import CliRunner

from ondevice.cli import bench, eval, generate, inspect
from ondevice.registry import create_backend, probe_backends
from ondevice.runtime import memory
from ondevice.runtime.engine import GenerateOptions
from ondevice.runtime.session import open_session
from ondevice.tools.evaluate.text import evaluate
from tests.tiny_model import write_tiny_model

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("kv") / "model")


def answer(command, *arguments):
    done = CliRunner().invoke(command, [*(str(a) for a in arguments), "--backend", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda", "mlx"])
def test_the_plan_is_what_the_cache_takes(tiny, backend):
    if not probe_backends()[backend].ready:
        pytest.skip(f"{backend} is not ready here")
    with open_session(tiny, backend=create_backend(backend), context=512, kv_dtype="int8") as session:
        list(session.engine.generate([1] * 512, GenerateOptions(max_tokens=1)))
        planned = memory.cache_bytes(session.config, session.backend, 512, kv_dtype="int8")
        assert planned == session.engine.cache.nbytes
        assert planned < memory.cache_bytes(session.config, session.backend, 512, kv_dtype="float16")


def test_eight_bits_cost_little_and_not_nothing(tiny):
    """The evaluation goes through the cache that was asked for; the reference never does."""
    with open_session(tiny, backend="cpu", exact=True) as against:
        kl = {}
        for kept in (None, "float32", "int8"):
            with open_session(tiny, backend="cpu", exact=True, kv_dtype=kept) as session:
                *_, found = evaluate(session, TEXT, context=64, against=against)
                kl[kept] = found.kl
    assert abs(kl["float32"]) < 1e-9 and abs(kl[None]) < 1e-9 < kl["int8"] < 1e-3


def test_every_command_takes_it(tiny, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    kept = [answer(inspect.command, tiny, "--json", "--kv-bits", bits)["kv_bytes_per_token"] for bits in (8, 16, 32)]
    assert kept[0] < 0.7 * kept[1] and kept[2] == 2 * kept[1]
    measured = answer(bench.command, tiny, "--json", "--kv-bits", 8, "--prompt-tokens", 3, "--generate-tokens", 2)
    assert measured["kv_bytes_per_token"] == kept[0]
    assert answer(eval.command, tiny, "--text", tmp_path / "text", "--json", "--kv-bits", 8)["kv_dtype"] == "int8"
    assert (
        answer(generate.command, tiny, "--prompt", "Hi", "--json", "--kv-bits", 8, "--max-tokens", 2)["text"]
        is not None
    )


def test_bits_that_are_not_there(tiny):
    assert CliRunner().invoke(generate.command, [str(tiny), "--prompt", "Hi", "--kv-bits", "5"]).exit_code == 2
