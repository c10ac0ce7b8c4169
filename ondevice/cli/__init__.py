"""The command line: one module a command, loaded only when used. Nothing heavy is imported from here.

Exit status: 0 done, 1 a stated error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
from importlib import import_module

import click

from .. import __version__
from ..errors import BadOption, OnDeviceError
from ..registry import did_you_mean
from . import console

COMMANDS = {  # name -> one line of help; the module of the same name holds `command`
    "chat": "Talk with a model.",
    "generate": "Continue a prompt.",
    "pull": "Fetch a model.",
    "models": "List the models that are here.",
    "convert": "Between GGUF, Hugging Face and MLX.",
    "quantize": "A model in fewer bits.",
    "prune": "A model with less in it: tokens, layers, channels, heads, experts, weights.",
    "shrink": "A model made to fit a size, the best of several ways.",
    "lora-train": "Teach a model from examples.",
    "average": "Several adapters into one, as in federated learning.",
    "fuse": "Work an adapter into its model.",
    "inspect": "What a model is made of, and what it needs.",
    "explain": "How a model reads a text, and what it says next.",
    "eval": "Perplexity of a text, and divergence from a reference.",
    "verify": "Compare the backends on one model.",
    "bench": "Measure load, prefill and decode speed.",
    "doctor": "What works here, what is missing and how to get it.",
}


class LazyGroup(click.Group):
    """Lists commands from the table; imports a command's module when it is run or asked for help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return import_module(f".{name.replace('-', '_')}", __package__).command if name in COMMANDS else None

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if args and args[0] not in COMMANDS:
            ctx.fail(f"There is no command {args[0]!r}. {did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ondevice")
@click.option("--debug", is_flag=True, help="Show where an error came from.")
def group(debug: bool) -> None:
    """Small language models that run, shrink, learn and answer on your own machine."""


def main(args: list[str] | None = None) -> None:
    """The entry point: runs a command and turns whatever goes wrong into two clear lines and an exit status."""
    status: list[int] = []
    _open_streams()
    if args is None:
        args = sys.argv[1:]
        atexit.register(_leave, status)
        signal.signal(signal.SIGTERM, _terminated)
    end = args.index("--") if "--" in args else len(args)  # what stands behind it is text
    debug = "--debug" in args[:end]
    args = [a for a in args[:end] if a != "--debug"] + args[end:]
    try:
        status.append(_run(args, debug))
    except BrokenPipeError:  # whoever read our output has left; nothing more can be said, and that is fine
        console.abandon_stdout()
        status.append(1)
    sys.exit(status[0])


def _open_streams() -> None:
    """Where whoever started this closed stdin, stdout or stderr, it leads nowhere. Python has None there, and the next
    file that is opened, a model's perhaps, would get its number and what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _leave(status: list[int]) -> None:
    """What is registered first is called last: all that others had to tidy up is done. Taking modules and models apart
    piece by piece would take a tenth of a short command's time, and the system does it at once."""
    if status and sys.gettrace() is None:  # who traces this process wants its end
        console.flush()
        os._exit(status[0])


def _terminated(*_: object) -> None:
    """As every way out does: what is half-made is tidied up."""
    sys.exit(128 + signal.SIGTERM)


def _run(args: list[str], debug: bool) -> int:
    try:
        group.main(args, prog_name="ondevice", standalone_mode=False)
        console.flush()
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        console.status("Interrupted.")
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            raise
        told = _tell(error)
        console.error(told)
        return 2 if isinstance(told, BadOption) else 1


def _tell(error: Exception) -> OnDeviceError:
    """What the machine refuses, and what we did not foresee, in two lines."""
    if isinstance(error, OnDeviceError):
        return error
    if isinstance(error, MemoryError):
        return OnDeviceError("There is not enough memory for this.", "Close other programs, or take a smaller model.")
    if isinstance(error, OSError):
        return _tell_os(error)
    what = (str(error).splitlines() or [""])[0]
    return OnDeviceError(
        f"ondevice failed in a way that it did not foresee: {type(error).__name__}: {what}",
        "That is a mistake of ours: please report it, with what `--debug` shows.",
    )


def _tell_os(error: OSError) -> OnDeviceError:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OnDeviceError(
            f"The disk is full{where}.", "Free some space and run this again; nothing was left half-written."
        )
    hint = "Check the path and its permissions." if error.filename else "Run it again with --debug to see where."
    return OnDeviceError(f"{error.strerror or error}{where}.", hint)
