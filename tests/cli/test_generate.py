"""`ondevice generate` and what programs rely on, over a tiny model; and one look at the real one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.tiny_model import write_tiny_model

KEYS = {
    "text", "token_ids", "prompt_token_ids", "finish_reason", "backend", "time_to_first_token_seconds",
    "prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))


def run(*args, input=None, **environment):
    return subprocess.run(
        [sys.executable, "-m", "ondevice", *args], input=input, capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip


def generate(model, *args, **options):
    done = run("generate", model, "--backend", "cpu", "--json", *args, **options)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return json.loads(done.stdout)


def test_one_object_with_what_programs_rely_on(tiny):
    answer = generate(tiny, "--prompt", "the end", "--max-tokens", "5", "--temperature", "0", "--ignore-eos")
    assert answer.keys() >= KEYS
    assert len(answer["token_ids"]) == 5 and answer["finish_reason"] == "length" and answer["backend"] == "cpu"


def test_text_goes_to_stdout_and_speed_to_stderr(tiny):
    told = generate(tiny, "--prompt", "the end", "--max-tokens", "5", "--temperature", "0")
    done = run("generate", tiny, "--backend", "cpu", "--prompt", "the end", "--max-tokens", "5", "--temperature", "0")
    assert done.stdout == told["text"] + "\n" and "a second" in done.stderr


def test_the_prompt_may_come_through_a_pipe(tiny):
    options = ("--max-tokens", "3", "--temperature", "0")
    assert (
        generate(tiny, *options, input="the end\n")["token_ids"]
        == generate(tiny, "--prompt", "the end", *options)["token_ids"]
    )


def test_the_same_seed_says_the_same(tiny):
    options = ("--prompt", "on and on", "--max-tokens", "12", "--temperature", "1.5", "--ignore-eos")
    first, again, other = (generate(tiny, *options, "--seed", seed)["token_ids"] for seed in ("7", "7", "8"))
    assert first == again != other


def test_a_stop_string_ends_the_answer_and_is_not_shown(tiny):
    options = ("--prompt", "the end", "--temperature", "0", "--ignore-eos", "--max-tokens", "20")
    whole = generate(tiny, *options)["text"]
    stop = whole[4:7]
    answer = generate(tiny, *options, "--stop", stop)
    assert answer["text"] == whole[: whole.index(stop)] and answer["finish_reason"] == "stop"


def test_a_logit_bias_decides(tiny):
    answer = generate(tiny, "--prompt", "a", "--max-tokens", "3", "--temperature", "0", "--logit-bias", "33:1000")
    assert answer["token_ids"] == [33, 33, 33]


def test_special_tokens_count_in_a_prompt_and_are_text_in_a_message(tiny):
    plain = generate(tiny, "--prompt", "<|im_end|>", "--max-tokens", "1")["prompt_token_ids"]
    chat = generate(tiny, "--chat", "--prompt", "<|im_end|>", "--max-tokens", "1")["prompt_token_ids"]
    end = plain[0]
    assert plain == [end] and chat.count(end) == 1  # the template's own


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (("--prompt", ""), 2),
        (("--prompt", "x", "--temperature", "-1"), 2),
        (("--prompt", "x", "--temperature", "nan"), 2),
        (("--prompt", "x", "--top-p", "2"), 2),
        (("--prompt", "x", "--top-k", "-5"), 2),
        (("--prompt", "x", "--max-tokens", "0"), 2),
        (("--prompt", "x", "--context", "0"), 2),
        (("--prompt", "x", "--context", "1000000"), 2),
        (("--prompt", "x", "--threads", "0"), 2),
        (("--prompt", "x", "--backend", "gpu"), 2),
        (("--prompt", "x", "--logit-bias", "nonsense"), 2),
        (("--prompt", "x", "--logit-bias", "999999:1"), 2),
        (("--prompt", "the end of all", "--context", "2"), 1),
    ],
)
def test_what_makes_no_sense_is_said(tiny, options, status):
    done = run("generate", tiny, *(options if "--backend" in options else (*options, "--backend", "cpu")))
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and not done.stdout and 1 < len(done.stderr.strip().splitlines()) <= 4


def test_a_model_without_a_template_cannot_chat(tmp_path):
    bare = str(write_tiny_model(tmp_path / "bare", template=None))
    done = run("generate", bare, "--chat", "--prompt", "x", "--backend", "cpu")
    assert done.returncode == 1 and "chat template" in done.stderr


def test_a_terminal_without_unicode_still_gets_the_rest():
    program = "from ondevice.cli import console; console.answer('caf\u00e9 ok')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout == "caf? ok\n"


def test_an_interrupt_ends_it_with_130(tiny):
    command = [
        sys.executable,
        "-m",
        "ondevice",
        "generate",
        tiny,
        "--prompt",
        "x",
        "--ignore-eos",
        "--backend",
        "reference",
    ]
    process = subprocess.Popen([*command, "--max-tokens", "4000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err


def test_the_real_model_knows_the_lazy_dog(smollm2_gguf):
    prompt = "The quick brown fox jumps over the lazy"
    answer = generate(str(smollm2_gguf), "--prompt", prompt, "--top-logprobs", "5", "--temperature", "0")
    (token,) = answer["top_logprobs"]
    assert token["top"][0]["token"] == " dog" and token["top"][0]["probability"] > 0.5
    assert answer["prompt_token_ids"] == [504, 2365, 6354, 16438, 27003, 690, 260, 23790]
