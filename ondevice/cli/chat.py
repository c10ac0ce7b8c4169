"""`ondevice chat [MODEL]`: talk with a model, at the terminal or through a pipe."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..catalog import DEFAULT
from ..errors import BadFile, BadOption, OnDeviceError
from ..registry import did_you_mean
from . import console
from .generate import describe, stream
from .model_options import (
    SAMPLING,
    adapter_choice,
    adapter_option,
    generate_options,
    open_model,
    runtime_options,
    sampling_options,
)

if TYPE_CHECKING:
    from ..runtime.chat import Conversation

MAX_TOKENS = 1024
HISTORY = 1000  # lines that are remembered from one time to the next
COMMANDS = {  # name -> what it takes, what it does; the method of Talk with this name does it
    "help": ("", "this list"),
    "clear": ("", "start again; the system prompt stays"),
    "system": ("[TEXT]", "show or change the system prompt; - removes it"),
    "retry": ("", "another answer to the last message"),
    "save": ("FILE", "write the conversation to a file"),
    "load": ("FILE", "go on with a saved conversation"),
    "adapter": ("[PATH[:WEIGHT] …]", "show or change the adapters; off removes them"),
    "set": ("[NAME VALUE]", "show or change temperature, max-tokens and the like"),
    "stats": ("", "speed of the last answer, use of context and memory"),
    "exit": ("", "leave; so do Ctrl-D and, at the prompt, Ctrl-C"),
}
NUMBERS = {name: kind for name, (_, kind, _) in SAMPLING.items()} | {"max-tokens": int, "seed": int}  # for /set


@click.command("chat")
@click.argument("model", default=DEFAULT)
@click.option("--system", help="What the model is told first.")
@click.option("--max-tokens", default=MAX_TOKENS, show_default=True, type=click.IntRange(1), help="Of one answer.")
@sampling_options()
@adapter_option()
@runtime_options(kv_bits=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line and answer on stdout.")
def command(
    model, system, max_tokens, stop, as_json, backend, exact, context, threads, kv_dtype, adapters, **sampling
):  # fmt: skip
    """Talk with MODEL (a folder, a .gguf file, a Hub repo or a catalog name; a small one is fetched if none is given).

    At the terminal, Ctrl-C stops an answer; /help lists the commands. A message over several lines stands between
    triple quotes, or has a backslash at the end of each line but the last. Through a pipe, every line is a message and
    only answers go to stdout.

    When the context is full, the oldest exchanges are hidden from the model, and this is said on stderr; the system
    prompt stays. What is not given of temperature and the like is as the model's generation_config.json says; without
    one, the likeliest token is taken.
    """
    from ..runtime.chat import Conversation

    with open_model(
        model, adapters, backend=backend, exact=exact, context=context, threads=threads, kv_dtype=kv_dtype
    ) as session:
        options = generate_options(session, sampling, max_tokens)
        talk = Talk(Conversation(session, options, stop, system), sys.stdin.isatty(), as_json)
        if not talk.terminal:
            talk.run()
            return
        info = session.backend.info()
        console.status(f"{model} on {info.name}: {info.device}. Context: {session.capacity} tokens. /help for help.")
        with _history():
            talk.run()


class Talk:
    """Lines in, answers out. `terminal`: someone types, so mistakes are told and forgiven; a pipe ends at the first."""

    def __init__(self, conversation: Conversation, terminal: bool, as_json: bool = False):
        self.conversation, self.terminal, self.as_json = conversation, terminal, as_json

    def run(self) -> None:
        while True:
            try:
                line = self._line("> ")
            except EOFError:
                if self.terminal:
                    console.status()
                return
            try:
                if line.startswith("/"):
                    self._command(*line[1:].rstrip().partition(" ")[::2])
                elif text := self._whole(line):
                    self._answer(self.conversation.send(text))
            except EOFError:  # /exit
                return
            except OnDeviceError as error:
                if not self.terminal:
                    raise
                console.error(error)
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                console.status("(stopped)")

    def _line(self, prompt: str) -> str:
        """Raises EOFError behind the last one."""
        try:
            if self.terminal:
                return console.ask(prompt)
            line = sys.stdin.buffer.readline()
            if not line:
                raise EOFError
            return line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise BadFile("What came from stdin is not UTF-8 text.", "Convert it first: iconv -t utf-8.") from None

    def _whole(self, line: str) -> str:
        """The message that begins with this line."""
        quotes, lines = '"""', []
        if line.lstrip().startswith(quotes):
            line = line.lstrip().removeprefix(quotes)
            with suppress(EOFError):
                while not line.rstrip().endswith(quotes):
                    lines.append(line)
                    line = self._line("… ")
                lines.append(line.rstrip().removesuffix(quotes))
            return "\n".join(lines).strip("\n")
        with suppress(EOFError):
            while line.endswith("\\"):
                lines.append(line[:-1])
                line = self._line("… ")
            lines.append(line)
        return "\n".join(lines).strip()

    def _answer(self, events: Iterator) -> None:
        conversation = self.conversation
        with closing(events):
            tokens, finished = stream(self._announced(events), not self.as_json)
        if self.as_json:
            prompt = conversation.exchanges[-1].prompt_ids
            console.json(describe(conversation.session, prompt, conversation.options, tokens, finished))
        capacity, held = conversation.session.capacity, len(conversation.session.engine.held)
        if finished.reason == "context":
            console.status(f"(The context of {capacity} tokens is full: the answer was cut. /clear starts again.)")
        elif finished.reason == "length":
            console.status(f"(Cut after {len(tokens)} tokens; for longer answers: /set max-tokens N)")
        if self.terminal:
            speed = finished.decode_tokens_per_second
            console.status(f"({len(tokens)} tokens, {speed:.1f} a second; {held} of {capacity} in the context)")

    def _announced(self, events: Iterator) -> Iterator:
        """The events of an answer; that some exchanges are hidden from now on is told."""
        from ..runtime.chat import Hidden

        for event in events:
            if not isinstance(event, Hidden):
                yield event
                continue
            what = "the oldest exchange" if event.exchanges == 1 else f"the {event.exchanges} oldest exchanges"
            console.status(f"(The context is full: from now on the model does not see {what}.)")

    # ---- commands

    def _command(self, name: str, rest: str) -> None:
        if name not in COMMANDS:
            raise BadOption(
                f"There is no command /{name}.",
                f"{did_you_mean(name, COMMANDS)} To send it as a message, put a space in front.",
            )
        takes, rest = COMMANDS[name][0], rest.strip()
        if bool(rest) != bool(takes) and not takes.startswith("["):
            raise BadOption(f"/{name} takes {takes or 'nothing'}.", f"Write: /{name} {takes}".rstrip())
        getattr(self, name)(*[rest] if takes else [])

    def help(self) -> None:
        for name, (takes, what) in COMMANDS.items():
            console.status(f"  /{name} {takes}".ljust(28) + " " + what)
        console.status('Messages over several lines: """ … """, or a backslash at the end of a line.')

    def clear(self) -> None:
        self.conversation.clear()
        console.status("(A new conversation.)")

    def system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == "-" else text
        shown = self.conversation.system
        console.status("(No system prompt but the model's own.)" if shown is None else f"System prompt: {shown}")

    def retry(self) -> None:
        if self.conversation.options.sampling.temperature == 0:
            console.status("(At temperature 0 the answer is always the same; try /set temperature 0.8)")
        self._answer(self.conversation.retry())

    def save(self, file: str) -> None:
        self.conversation.save(Path(file).expanduser())
        console.status(f"(Saved to {file}.)")

    def load(self, file: str) -> None:
        self.conversation.load(Path(file).expanduser())
        console.status(f"(Exchanges loaded: {len(self.conversation.exchanges)}.)")

    def adapter(self, what: str) -> None:
        session = self.conversation.session
        if what:
            try:
                given = [] if what == "off" else [adapter_choice(text) for text in shlex.split(what)]
            except ValueError as error:
                raise BadOption(f"/adapter {what}: {error}.", "Put quotes around a path with spaces.") from None
            session.adapt([(Path(path).expanduser(), weight) for path, weight in given])
        for attached in session.attached:
            adapter = attached.adapter
            where = f"on {len(adapter.updates)} weights"
            where = where if adapter.prompt is None else f"in {adapter.prompt.shape[0]} virtual tokens"
            console.status(f"(Adapter: {attached}, {adapter.parameters / 1e6:.2f}M parameters {where}.)")
        if not session.attached:
            console.status("(No adapter: the model is as it came.)")

    def set(self, what: str) -> None:
        name, _, text = what.replace("=", " ").partition(" ")
        name, text = name.replace("_", "-"), text.strip()
        if not name:
            for name in NUMBERS:
                console.status(f"  {name.ljust(20)} {self._number(name)}")
            return
        if name not in NUMBERS:
            raise BadOption(f"There is no setting {name!r}.", did_you_mean(name, NUMBERS))
        try:
            value = NUMBERS[name](text)
        except ValueError:
            kind = "a whole number" if NUMBERS[name] is int else "a number"
            raise BadOption(f"{name} needs {kind}, not {text!r}.", f"Now it is {self._number(name)}.") from None
        options = self.conversation.options
        if name in SAMPLING:
            change = {"sampling": replace(options.sampling, **{SAMPLING[name][0]: value})}
        else:
            change = {name.replace("-", "_"): value}
        self.conversation.options = replace(options, **change)

    def _number(self, name: str) -> float | None:
        options = self.conversation.options
        owner, field = (options.sampling, SAMPLING[name][0]) if name in SAMPLING else (options, name.replace("-", "_"))
        return getattr(owner, field)

    def stats(self) -> None:
        from ..machine import peak_memory_bytes

        conversation, last = self.conversation, self.conversation.last
        session, info = conversation.session, conversation.session.backend.info()
        if last:
            console.status(
                f"prompt    {last.prompt_tokens} tokens at {last.prefill_tokens_per_second:.1f} a second; "
                f"{last.reused_tokens} more were in the cache\n"
                f"answer    {len(last.token_ids)} tokens at {last.decode_tokens_per_second:.1f} a second, "
                f"the first after {last.first_token_seconds:.2f} s"
            )
        console.status(
            f"context   {len(session.engine.held)} of {session.capacity} tokens; exchanges: "
            f"{len(conversation.exchanges)}, hidden from the model: {conversation.hidden}\n"
            f"backend   {info.name}: {info.device}, {info.dtype}{', exact' if info.exact else ''}\n"
            f"memory    {peak_memory_bytes() / 1e6:.0f} MB at most so far; "
            f"cache {session.engine.cache.nbytes / 1e6:.0f} MB when it is full"
        )

    def exit(self) -> None:
        raise EOFError


@contextmanager
def _history() -> Iterator[None]:
    """Lines can be edited and called back, those of earlier times too, where Python has readline."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    from .. import hub

    path = hub.home() / "chat-history"
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
