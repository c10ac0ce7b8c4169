"""The command line's frame: lazy commands, exit statuses, two-line errors, one JSON object."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest

from ondevice import cli
from ondevice.cli import console
from ondevice.errors import BadFile, BadOption
from ondevice.registry import did_you_mean


def run(*args, **options):
    return subprocess.run([sys.executable, "-m", "ondevice", *args], capture_output=True, text=True, **options)


def failing(monkeypatch, error):
    @click.command("models")
    def command():
        raise error

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: command)


def status(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(args))
    return stop.value.code, capsys.readouterr()


def test_help_names_every_command():
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name):
    done = run(name, "--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage: ondevice"), done.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_says_what_it_is(name):
    command = cli.group.get_command(click.Context(cli.group), name)
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert options and all(option.help for option in options)


def test_an_unknown_command_gets_a_suggestion():
    done = run("generat")
    assert done.returncode == 2 and "Did you mean 'generate'?" in done.stderr and not done.stdout


def test_an_unknown_option_is_wrong_usage():
    assert run("models", "--nonsense").returncode == 2


@pytest.mark.parametrize(
    ("error", "code", "first"),
    [
        (BadFile("x.gguf is cut short.", "Fetch it again."), 1, "Error: x.gguf is cut short."),
        (BadOption("--bits 7 is not known.", "Known: 4, 8."), 2, "Error: --bits 7 is not known."),
        (MemoryError(), 1, "Error: There is not enough memory for this."),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/model"), 1, "Error: The disk is full (out/model)."),
        (
            RuntimeError("strange\nmore"),
            1,
            "Error: ondevice failed in a way that it did not foresee: RuntimeError: strange",
        ),
        (BadFile("a\nb \x1b[2Jc.", "d"), 1, "Error: a b ?[2Jc."),
        (click.FileError("x.json", "unreadable"), 1, "Error: Could not open file 'x.json': unreadable"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x"), 1, "Error: Permission denied (/x)."),
    ],
)
def test_errors_are_two_lines_and_a_status(monkeypatch, capsys, error, code, first):
    failing(monkeypatch, error)
    got, output = status(capsys, "models")
    lines = output.err.splitlines()
    assert got == code and lines[0] == first and len(lines) <= 2 and not output.out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("quantize M D --method rtn --steps 3", "--steps is for --method distill"),
        ("quantize M D --method rtn --tokens 512", "--tokens is for methods that are calibrated"),
        ("quantize M D --bits 3 --target-size 9MB", "--bits is for a size that no target gives"),
        ("quantize M D --mode mxfp4 --group-size 32", "--group-size is for --mode affine"),
        ("prune M D --layers 1 --method wanda", "--method is for --sparsity"),
        ("prune M D --layers 1 --backend cpu", "--backend is for --heal"),
        ("bench M --bits 8", "--bits is for --random-weights"),
        ("eval M --tasks arc_easy --worst 0", "--worst is for --text"),
        ("lora-train M data.jsonl --out D --method prompt --rank 8", "--rank is for --method lora"),
        ("lora-train M data.jsonl --out D --method full --target q_proj", "--target is for --method lora"),
        ("lora-train M data.jsonl --out D --from-scratch --method lora", "--method is for a model that is not"),
        ("lora-train M data.jsonl --out D --beta 0.1", "--beta is for --objective dpo or orpo"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(capsys, args, said):
    """Also one that says what is the default anyway; before a model is looked for."""
    code, told = status(capsys, *args.split())
    assert (code, told.out) == (2, "") and said in told.err


@pytest.mark.parametrize("text", ["0%", "100%", "nan%", "30", "x"])
@pytest.mark.parametrize(("option", "takes"), [("--target", "such as 20%"), ("--sparsity", "50% or 2:4")])
def test_what_takes_no_count_asks_for_none(capsys, option, takes, text):
    code, told = status(capsys, "prune", "M", "D", option, text)
    assert code == 2 and f"{option} {text} makes no sense" in told.err and takes in told.err.splitlines()[-1]


def test_a_model_without_a_name_is_not_the_folder_where_we_are(capsys, tmp_path, monkeypatch):
    """As a script has it whose variable is empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.gguf").touch()
    assert status(capsys, "inspect", "")[0] == 2


def test_of_a_long_list_the_likeliest_are_named():
    known = [f"task_{i:05}" for i in range(20_000)]
    told = did_you_mean("quite another", known)
    assert len(told) < 200 and "20000" in told and did_you_mean("tsk_00017", known) == "Did you mean 'task_00017'?"


CLOSED = """
import sys
from ondevice import cli

def work(args, debug):
    print("an answer")
    print("a status", file=sys.stderr)
    return len(sys.stdin.read())

cli._run = work
cli.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell closes streams")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_lead_nowhere(closed):
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, CLOSED], capture_output=True, text=True, input=""
    )
    shut = closed.split()
    assert (done.returncode, done.stdout) == (0, "" if ">&-" in shut else "an answer\n")
    assert done.stderr == ("" if "2>&-" in shut else "a status\n")


def test_an_interrupt_is_130(monkeypatch, capsys):
    failing(monkeypatch, KeyboardInterrupt())
    got, output = status(capsys, "models")
    assert got == 130 and "Traceback" not in output.err


def test_debug_shows_where(monkeypatch):
    failing(monkeypatch, BadFile("x", "y"))
    with pytest.raises(BadFile):
        cli.main(["--debug", "models"])


def test_debug_behind_two_dashes_is_text(monkeypatch, capsys):
    seen = []

    @click.command("models")
    @click.argument("words", nargs=-1)
    def command(words):
        seen.append(words)

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: command)
    assert status(capsys, "--debug", "models", "--", "--debug")[0] == 0 and seen == [("--debug",)]


def test_json_is_ascii_and_knows_numpy(capsys):
    console.json({"a": np.float32(0.5), "b": Path("x"), "c": "é\ud800"})
    out = capsys.readouterr().out
    assert out.isascii() and json.loads(out) == {"a": 0.5, "b": "x", "c": "é\ud800"}
    with pytest.raises(TypeError):
        console.json({"a": object()})


def test_json_has_no_word_for_infinity(capsys):
    console.json({"perplexity": float("inf"), "several": [np.float32("nan"), (1.5, np.int64(2))], None: True})
    assert capsys.readouterr().out.strip() == '{"perplexity": null, "several": [null, [1.5, 2]], "null": true}'


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from ondevice import cli; cli.main(['doctor'])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert b"Traceback" not in err and b"BrokenPipe" not in err


def test_doctor_computes_on_every_ready_backend():
    done = run("doctor", "--json")
    facts = {b["name"]: b for b in json.loads(done.stdout)["backends"]}
    assert facts["reference"]["available"] and facts["cpu"]["available"]
    for backend in facts.values():
        assert {"available", "reason", "hint"} <= backend.keys()
        assert backend["available"] or (backend["reason"] and backend["hint"])


@pytest.fixture
def sick(monkeypatch):
    """doctor examines a reference backend whose `linear` a test replaces."""
    from ondevice.cli import doctor
    from ondevice.registry import Probe, create_backend

    ops = create_backend("reference")
    wanted = doctor._tiny_logits(ops)
    monkeypatch.setattr("ondevice.registry.create_backend", lambda name: ops)
    return ops, lambda: doctor._examine("reference", Probe.available("here", 0), wanted)


def test_doctor_finds_a_sound_backend_sound(sick):
    found = sick[1]()
    assert found["available"] and found["details"]["error"] == 0


@pytest.mark.parametrize("share", [1.2, -1.0, float("nan")])
def test_doctor_notices_a_backend_that_computes_wrongly(sick, monkeypatch, share):
    ops, examine = sick
    right = ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, w, *rest: right(x, w, *rest) * share)
    found = examine()
    assert not found["available"] and "wrongly" in found["reason"] and found["hint"]


def test_doctor_survives_a_backend_that_breaks(sick, monkeypatch):
    def broken(*_):
        raise RuntimeError("no driver\nand more")

    monkeypatch.setattr(sick[0], "rms_norm", broken)
    found = sick[1]()
    assert not found["available"] and found["reason"].endswith("RuntimeError: no driver") and found["hint"]


def test_doctor_says_what_is_installed():
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["packages"]["numpy"] and facts["cores"] >= 1 and facts["free_bytes"] > 0
    assert set(facts["catalog"]) == {"smollm2-135m"} and facts["python"] == sys.version.split()[0]


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, capsys):
    """Nothing of short work; of long work a line every 15 seconds, across its stages."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress("Fetching", unit="bytes") as progress:
        for now[0] in range(15):
            progress.update(now[0] * 1e6, 14e6)
    assert capsys.readouterr() == ("", "")
    with console.stages() as show:
        for now[0] in range(100, 160):
            stage = "Reading" if now[0] < 110 else "Rounding"
            show(SimpleNamespace(stage=stage, done=now[0] - 99, total=60, unit="layers"))
    out, err = capsys.readouterr()
    said = ["Rounding: 16 of 60 layers, 14 s left", "Rounding: 31 of 60 layers, 19 s left"]
    assert out == "" and err.splitlines() == [*said, "Rounding: 46 of 60 layers, 11 s left"]


def test_a_status_wipes_the_progress_line(monkeypatch, capsys):
    monkeypatch.setattr(console, "interactive", lambda: True)
    monkeypatch.setattr(console, "WATCHED", 0)
    with console.progress("Fetching") as progress:
        progress.update(1, 2)
        console.status("Hello")
        assert capsys.readouterr().err.endswith("\r" + " " * len("Fetching: 1 of 2") + "\rHello\n")


def test_progress_says_how_long(monkeypatch, capsys):
    monkeypatch.setattr(console, "interactive", lambda: True)
    monkeypatch.setattr(console, "WATCHED", 0)
    with console.progress("Fetching", unit="bytes") as progress:
        progress.started -= 10
        progress.update(5e6, 1e7)
    assert "Fetching: 5 of 10 MB, 10 s left" in capsys.readouterr().err


LEAVING = """
import atexit, sys, threading, time
from ondevice import cli

class Held:
    def __del__(self):
        print("taken apart")

def work(args, debug):
    global held
    held = Held()
    held.itself = held
    atexit.register(lambda: print("tidied up"))
    threading.Thread(target=lambda: (time.sleep(0.2), print("worked to its end"))).start()
    sys.stdout.write("unflushed ")
    return 3

cli._run = work
cli.main()
"""


def test_leaving_at_once_loses_nothing():
    """Threads end, what was registered is called, output arrives; only objects are not taken apart one by one."""
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True)
    assert done.stdout.split() == "unflushed worked to its end tidied up".split()
    assert (done.returncode, done.stderr) == (3, "")


NOT_FOR_A_FIRST_TOKEN = """
import sys
sys.argv[1:] = ["generate", sys.argv[1], "--prompt", "The capital of France", "--max-tokens", "1", "--backend", "cpu"]
import atexit
from ondevice.cli import main
atexit.register(lambda: print("LOADED", *sys.modules))
main(sys.argv[1:])
"""


def test_a_first_token_waits_for_few_modules(smollm2_gguf):
    done = subprocess.run([sys.executable, "-c", NOT_FOR_A_FIRST_TOKEN, smollm2_gguf], capture_output=True, text=True)
    loaded = done.stdout.partition("LOADED ")[2].split()
    needless = "importlib.metadata email hashlib socket ssl subprocess tempfile zipfile shutil secrets difflib logging"
    needless += " ondevice.hub.entries ondevice.hub.files ondevice.checkpoint.write ondevice.checkpoint.quantized"
    needless += (
        " ondevice.adapters ondevice.runtime.template ondevice.runtime.tokenizer.export sentencepiece rich jinja2"
    )
    needless += " huggingface_hub gguf torch mlx transformers"
    assert len(loaded) > 100, done.stderr
    assert not set(needless.split()) & set(loaded)
    assert len([name for name in loaded if name.split(".")[0] not in ("numpy", "encodings")]) < 260
