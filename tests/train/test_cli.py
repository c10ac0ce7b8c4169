"""`ondevice lora-train` as programs and people call it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ondevice.cli import main
from ondevice.runtime.session import open_session
from tests.cli.hub_server import Hub

from .conftest import chat, sums, write_lines


@pytest.fixture
def call(capsys):
    """arguments of lora-train -> its exit status must be `code`; what it wrote"""

    def run(*arguments, code: int = 0):
        with pytest.raises(SystemExit) as stop:
            main(["lora-train", *map(str, arguments)])
        written = capsys.readouterr()
        assert (stop.value.code or 0) == code, written.err
        assert "Traceback" not in written.err
        return written

    return run


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_what_programs_rely_on(call, tiny, data_file, tmp_path):
    out = tmp_path / "adapter"
    done = call(
        tiny, data_file, "--out", out, "--method", "lora", "--rank", 8, "--batch-size", 4, "--max-length", 256,
        "--steps", 12, "--seed", 3, "--backend", "cpu", "--json",
    )  # fmt: skip
    found = metrics(out)
    assert [m["step"] for m in found] == list(range(1, 13))
    assert all(m["loss"] > 0 and m["tokens_per_second"] > 0 and m["peak_memory_bytes"] > 10**7 for m in found)
    assert any("validation_loss" in m for m in found) and not all("validation_loss" in m for m in found)
    told = json.loads(done.out)
    assert told["step"] == 12 and told["validation_loss"] == min(m.get("validation_loss", 99) for m in found)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    again = tmp_path / "again"
    call(tiny, data_file, "--out", again, "--steps", 12, "--seed", 3, "--backend", "cpu", "--max-length", 256)
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (out, again)]
    assert weights[0] == weights[1], "the same seed gives the same adapter"


def test_a_dataset_of_the_hub(tiny, tmp_path):
    """In processes of its own: the library reads HF_ENDPOINT and HF_HOME when it is imported."""
    pytest.importorskip("datasets")
    splits = {"train": sums(3), "validation": sums(2)}
    files = {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows) for name, rows in splits.items()}
    hub = Hub()
    hub.repos["datasets/owner/sums"] = {name: text.encode() for name, text in files.items()}
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub")}

    def teach(name: str, out: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "ondevice", "lora-train", str(tiny), f"hf:{name}", "--out", str(out)]
        options = ["--steps", "2", "--max-length", "64", "--backend", "cpu"]
        return subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=120)

    try:
        done, missing = teach("owner/sums", tmp_path / "a"), teach("owner/none", tmp_path / "b")
    finally:
        hub.close()
    assert done.returncode == 0, done.stderr
    assert "9 examples to learn from" in done.stderr and "4 for validation" in done.stderr
    assert missing.returncode and "The dataset owner/none cannot be had" in missing.stderr
    assert "Traceback" not in missing.stderr and not (tmp_path / "b").exists()


def test_the_adapter_changes_what_is_said(call, tiny, tmp_path, capsys):
    out = tmp_path / "adapter"
    data = write_lines(tmp_path / "data.jsonl", [chat("hello", "the cat and the dog")] * 8)
    call(tiny, data, "--out", out, "--steps", 60, "--learning-rate", "3e-2", "--rank", 16, "--validation", 0)
    with pytest.raises(SystemExit):
        main(["generate", str(tiny), "--prompt", "hello", "--chat", "--adapter", str(out), "--max-tokens", "12"])
    assert "the cat and the dog" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said", "code"),
    [
        (["--rank", "0"], "--rank 0 makes no sense", 2),
        (["--target", "q_prj"], "Did you mean 'q_proj'", 2),
        (["--target", "q_proj:0"], "makes no sense", 2),
        (["--objective", "distill"], "a teacher", 1),
        (["--objective", "dpo"], "no 'chosen'", 1),
        (["--memory", "lots"], "is no size", 2),
        (["--layers", "0"], "leaves nothing to adapt", 2),
        (["--save-minutes", "nan"], "--save-minutes nan makes no sense", 2),
        (["--init", "nowhere"], "no adapter folder", 1),
        (["--memory", "1M"], "Training needs about", 1),
        (["--max-length", "8"], "longer than --max-length", 1),
        (["--learning-rate", "inf"], "--learning-rate inf makes no sense", 2),
        (["--learning-rate", "1e30"], "Step 1 stopped: its update leaves numbers that are none", 1),
        (["--learning-rate", "1e6", "--schedule", "constant", "--clip", "0", "--method", "full"], "--learning-rate", 1),
    ],
)
def test_what_makes_no_sense(call, tiny, data_file, tmp_path, options, said, code):
    out = tmp_path / "out"
    done = call(tiny, data_file, "--out", out, "--steps", 30, *options, code=code)
    errors = done.err.splitlines()[-2:]
    assert errors[0].startswith("Error: ") and said in " ".join(errors)
    assert not (out / "adapter_model.safetensors").exists()
    assert out.exists() == (code == 1 and "--learning-rate" in options), "nothing is left where nothing came of it"


def test_what_the_context_does_not_hold(call, tiny, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [{"text": "short"}, {"text": "word " * 1000}])
    done = call(tiny, data, "--out", tmp_path / "out", "--max-length", 9000, "--validation", 0, code=2)
    errors = done.err.splitlines()[-2:]
    assert "data.jsonl:2 has 5001 tokens" in errors[0] and errors[1] == "Give --max-length 4096 or less."
    assert not (tmp_path / "out").exists()


def test_an_update_that_spoils_all_is_not_made(call, tiny, data_file, tmp_path):
    """Numbers that overflow at the third step: what was there behind the second is kept, and it is finite."""
    from safetensors.numpy import load_file

    out = tmp_path / "out"
    call(tiny, data_file, "--out", out, "--learning-rate", "3e18", "--warmup", 30, "--steps", 40, code=1)
    done = len(metrics(out))
    kept = load_file(out / "checkpoint.safetensors")
    assert done and all(np.isfinite(values).all() for values in kept.values())
    assert all(np.isfinite(m.get("validation_loss", 0)) for m in metrics(out))


def test_beginning_with_an_adapter(call, tiny, data_file, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    call(tiny, data_file, "--out", first, "--steps", 20, "--learning-rate", "1e-2", "--no-keep-best")
    call(tiny, data_file, "--out", second, "--steps", 2, "--init", first)
    assert metrics(second)[0]["loss"] < 0.8 * metrics(first)[0]["loss"]
    for options, said in ((["--rank", 4], "does not fit"), (["--alpha", 3], "Give --alpha 16")):
        done = call(tiny, data_file, "--out", tmp_path / "third", "--init", first, *options, code=2)
        assert said in done.err


def test_a_loss_that_is_no_number_names_its_examples(call, tiny, data_file, tmp_path):
    from safetensors.numpy import load_file, save_file

    broken = shutil.copytree(tiny, tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][ord("Z") - 33 + 2] = float("nan")
    save_file(weights, broken / "model.safetensors")
    data = write_lines(tmp_path / "data.jsonl", [*sums(4), chat("ZZZ", "no")])
    out = tmp_path / "out"
    options = ["--no-shuffle", "--batch-size", 2, "--validation", 0, "--epochs", 2]
    done = call(broken, data, "--out", out, *options, code=1)
    errors = done.err.splitlines()[-2:]
    assert "Step 9" in errors[0] and "data.jsonl:17" in errors[0] and "step 8 is kept" in errors[1]
    assert len(metrics(out)) == 8 and (out / "checkpoint.safetensors").is_file()


def test_early_stopping_keeps_the_best(call, tiny, tmp_path):
    folder = tmp_path / "data"
    write_lines(folder / "train.jsonl", [chat(f"say {a}", f"{7 * a % 5}{3 * a % 7}") for a in range(6)])
    write_lines(folder / "valid.jsonl", [chat(f"say {a}", f"{7 * a % 5}{3 * a % 7}") for a in range(20, 28)])
    out = tmp_path / "out"
    options = ["--steps", 400, "--learning-rate", "2e-2", "--validate-every", 5, "--patience", 4, "--json"]
    told = json.loads(call(tiny, folder, "--out", out, *options).out)
    measured = {m["step"]: m["validation_loss"] for m in metrics(out) if "validation_loss" in m}
    assert told["stopped_early"] and told["step"] < 400
    assert told["kept"] == min(measured, key=measured.get) < told["step"]
    assert (out / "curves.png").stat().st_size > 10_000


def test_from_scratch(call, tiny, data_file, tmp_path):
    config = tmp_path / "config"
    config.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, config / name)
    out = tmp_path / "model"
    call(config, data_file, "--out", out, "--from-scratch", "--steps", 60, "--learning-rate", "1e-2")
    found = metrics(out)
    assert found[0]["loss"] == pytest.approx(4.66, abs=0.1), "at first every token is as likely as another"
    assert found[-1]["loss"] < 2.5
    with open_session(out) as model:
        assert model.config.width == 32 and model.template.source
    assert not list(out.glob(".*"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_it_live(tiny, data_file, tmp_path):
    import os
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "ondevice", "lora-train", str(tiny), str(data_file), "--out", str(tmp_path / "o")]
    run = subprocess.Popen([*command, "--steps", "40"], stderr=follower, stdout=follower)
    os.close(follower)
    seen = b""
    while True:
        try:
            chunk = os.read(leader, 4096)
        except OSError:
            break
        seen += chunk
        if not chunk:
            break
    assert run.wait(60) == 0
    text = seen.decode()
    for word in ("loss", "validation", "tokens/s", "memory", "left", "40 of 40"):
        assert word in text, word


def test_tensorboard_sees_the_run(call, tiny, data_file, tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    out, board = tmp_path / "out", tmp_path / "board"
    call(tiny, data_file, "--out", out, "--steps", 6, "--tensorboard", board)
    raw, at, seen = next(board.iterdir()).read_bytes(), 0, {}
    while at < len(raw):  # a record: its length, a checksum, itself, another checksum
        (size,) = struct.unpack("<Q", raw[at : at + 8])
        event = Event.FromString(raw[at + 12 : at + 12 + size])
        seen |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        at += 16 + size
    for line in metrics(out):
        told = {name: value for name, value in line.items() if name != "step"}
        assert {tag for step, tag in seen if step == line["step"]} == told.keys()
        assert all(seen[line["step"], tag] == pytest.approx(value, rel=1e-6) for tag, value in told.items())


def test_without_tensorboard(call, tiny, data_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    done = call(tiny, data_file, "--out", tmp_path / "out", "--steps", 1, "--tensorboard", tmp_path / "b", code=1)
    assert done.err.splitlines()[-1] == "pip install tensorboardX"
    assert not (tmp_path / "out").exists() and not (tmp_path / "b").exists()
