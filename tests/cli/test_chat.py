"""`ondevice chat` through pipes and on a terminal, over a tiny model."""

import os
import pty
import select
import subprocess
import sys
import time

import pytest

from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))


def piped(model, text, *options):
    command = [sys.executable, "-m", "ondevice", "chat", model, "--backend", "cpu", "--temperature", "0", *options]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)


def test_through_a_pipe_only_answers_go_to_stdout(tiny):
    done = piped(tiny, "the end\n", "--max-tokens", "6")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and ">" not in done.stdout.splitlines()[0][:2]


def test_a_saved_conversation_goes_on(tiny, tmp_path):
    file = tmp_path / "talk.json"
    first = piped(tiny, f"the end\n/save {file}\n", "--max-tokens", "6")
    assert first.returncode == 0 and file.is_file(), first.stderr
    again = piped(tiny, f"/load {file}\n/retry\n", "--max-tokens", "6")
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == first.stdout.strip()  # greedy: another try says the same


def test_an_unknown_command_gets_a_suggestion_and_the_chat_goes_on(tiny):
    done = piped(tiny, "/hlp\n/stats\n", "--max-tokens", "3")
    assert "help" in done.stderr and "Traceback" not in done.stderr


def test_a_full_context_is_said_and_old_exchanges_go(tiny):
    lines = "\n".join("on and on and on and on and on" for _ in range(8))
    done = piped(tiny, lines + "\n", "--context", "220", "--max-tokens", "20")
    assert done.returncode == 0, done.stderr
    assert "context" in done.stderr.lower() and len(done.stdout.strip().splitlines()) >= 8


def test_a_message_that_can_never_fit_is_refused(tiny):
    done = piped(tiny, "no " * 300 + "\n", "--context", "64")
    assert "context" in done.stderr.lower() and "Traceback" not in done.stderr


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *command):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.seen = ""

    def wait_for(self, text, seconds=60):
        until = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < until, self.seen
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 65536).decode("utf-8", "replace")

    def type(self, text):
        self.seen = ""
        os.write(self.master, text.encode())


def test_ctrl_c_stops_the_answer_and_not_the_program(tiny):
    options = ["--backend", "reference", "--ignore-eos", "--max-tokens", "4000"]
    command = [sys.executable, "-m", "ondevice", "chat", tiny, *options]
    # the terminal must be the session's own for Ctrl-C to become a signal
    opener = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    terminal = Terminal(sys.executable, "-c", opener, *command)
    terminal.wait_for("> ")
    terminal.type("the end\n")
    time.sleep(1.5)
    terminal.type("\x03")
    terminal.wait_for("stopped")
    terminal.wait_for("> ")
    terminal.type("/exit\n")
    assert terminal.process.wait(timeout=30) == 0
