"""`ondevice lora-train MODEL DATA --out ADAPTER`: teach a model, on any backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..train.settings import Settings
from . import console
from .model_options import model_argument, only, runtime_options, size

if TYPE_CHECKING:
    from ..train import Data, Finished, Started, StepDone

LOW_RANK = ("rank", "alpha", "dropout", "targets", "modules_to_save", "layers")  # settings of LoRA and its kin alone
TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def settings_options(command: Callable) -> Callable:
    """One option for each field of Settings, with its default and help."""
    for field in reversed(fields(Settings)):
        rules, kind = field.metadata, field.type.partition(" ")[0]
        if kind.startswith("tuple"):
            name = "--target" if field.name == "targets" else "--module-to-save"
            option = click.option(name, field.name, multiple=True, help=rules["help"])
        elif kind == "bool":
            name = field.name.replace("_", "-")
            shown = field.default is not None
            option = click.option(
                f"--{name}/--no-{name}", default=field.default, show_default=shown, help=rules["help"]
            )
        else:
            type = click.Choice(rules["known"]) if "known" in rules else TYPES[kind]
            shown = field.default is not None
            name = f"--{field.name.replace('_', '-')}"
            option = click.option(
                name, field.name, type=type, default=field.default, show_default=shown, help=rules["help"]
            )
        command = option(command)
    return command


@click.command("lora-train")
@model_argument
@click.argument("data")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The adapter's folder, made by this.")
@settings_options
@click.option("--teacher", metavar="MODEL", help="Whom to imitate, with --objective distill.")
@click.option("--init", "initial", metavar="ADAPTER", help="Begin with this adapter's factors.")
@click.option("--from-scratch", is_flag=True, help="Forget MODEL's weights: begin at random, train all of them.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, exactly; start it where there is none.")
@click.option("--save-every", type=click.IntRange(1), metavar="STEPS", help="Steps between checkpoints.")
@click.option("--save-minutes", type=float, default=5.0, show_default=True, help="Minutes between checkpoints.")
@click.option("--memory", metavar="SIZE", help="What to plan for, such as 700M or 4G; default: most of this machine's.")
@click.option("--tensorboard", type=click.Path(path_type=Path), metavar="FOLDER", help="Write for TensorBoard, too.")
@runtime_options(context=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, at the end.")
def command(
    model, data, out, teacher, initial, from_scratch, resume, save_every, save_minutes, memory, tensorboard, backend,
    exact, threads, as_json, **options,
):  # fmt: skip
    """Teach MODEL what stands in DATA: a JSONL file, a folder with train.jsonl, valid.jsonl and test.jsonl, or a
    Hugging Face dataset (hf:OWNER/NAME). Lines are {"messages": […]}, {"prompt": …, "completion": …}, {"text": …}, or
    {"prompt": …, "chosen": …, "rejected": …}.

    Writes an adapter (with --method full: a model) that chat, generate, eval and fuse take, in PEFT's format."""
    from ..runtime.session import open_session
    from ..train import Saving, load_data, train
    from ..train.folder import admit, locked

    settings, room = _settings(options, from_scratch), size("--memory", memory) if memory else None
    with locked(out):
        admit(out, resume)  # said before anything is read
    opened = {"backend": backend, "exact": exact, "threads": threads, "say": console.status}
    with ExitStack() as stack:
        shown = stack.enter_context(_board(tensorboard))
        if from_scratch:
            model = stack.enter_context(_untrained(model, settings.seed))
        session = stack.enter_context(open_session(model, **opened))
        taught = stack.enter_context(open_session(teacher, **opened)) if teacher else None
        with console.progress("Reading", unit="lines") as progress:
            preference = settings.objective in ("dpo", "orpo")
            found = load_data(
                data, session, settings.max_length, preference, settings.validation, settings.seed, progress.update
            )
        _tell_data(found)
        run = train(
            session, found, settings, out, resume=resume, saving=Saving(save_every, save_minutes), teacher=taught,
            initial=_initial(initial, session, settings), memory=room,
        )  # fmt: skip
        finished = _follow(_shown(run, shown), session.backend.name)
    _draw(out)
    console.json({"adapter": out, **finished.as_dict()}) if as_json else console.answer(_ending(finished, out))


def _settings(options: dict[str, Any], from_scratch: bool) -> Settings:
    method, objective = options["method"], options["objective"]
    only("a model that is not begun from scratch", not from_scratch or method == "full", "method")
    low_rank = method in ("lora", "rslora", "dora") and not from_scratch
    only("--method lora, rslora or dora", low_rank, *LOW_RANK)
    only("--method prompt", method == "prompt", "virtual_tokens")
    only("--objective dpo or orpo", objective in ("dpo", "orpo"), "beta")
    only("--objective distill", objective == "distill", "temperature", "hard")
    if from_scratch:
        from ..train.scratch import RATE

        options["method"] = "full"
        options["learning_rate"] = options["learning_rate"] or RATE
    options["targets"] = options["targets"] or Settings.targets
    return Settings(**options)


def _board(folder: Path | None) -> AbstractContextManager:
    from ..train.tensorboard import board

    return nullcontext() if folder is None else board(folder)


def _shown(run: Generator, board: Any) -> Iterator[Any]:
    """The events of a run, shown to TensorBoard as they pass."""
    with closing(run):
        for event in run:
            if board is not None:
                board.add(event)
            yield event


def _untrained(model: str, seed: int) -> AbstractContextManager[Path]:
    from .. import hub
    from ..train.scratch import untrained

    return untrained(hub.resolve(model, console.status), seed)


def _tell_data(data: Data) -> None:
    aside = f", {len(data.valid)} for validation" if data.valid else ""
    held = " (held out: there is no valid.jsonl)" if data.held_out else ""
    console.status(f"{len(data.train)} examples to learn from ({data.tokens} tokens){aside}{held}.")
    if not data.valid:
        console.status("Nothing to validate with: overfitting will not be seen.")
    if data.truncated:
        console.status(f"{data.truncated} examples are longer than --max-length and were cut.")
    if data.dropped:
        console.status(f"{data.dropped} of them had nothing to learn left and are not used.")


def _follow(run: Any, backend: str) -> Finished:
    """Shows the events; returns what the last says."""
    from ..train import Finished, Saved, Started, StepDone, Validating

    with console.dashboard("Training") as view:
        tracker = _Tracker()
        try:
            for event in run:
                if isinstance(event, Started):
                    tracker.start(event)
                    view.say(_plan(event, backend))
                elif isinstance(event, StepDone):
                    tracker.add(event)
                    view.show(event.step, tracker.total, tracker.facts(), tracker.line(), event.loss)
                elif isinstance(event, Validating):
                    view.note(f"validating {event.done + 1} of {event.total}")
                elif isinstance(event, Saved):
                    view.note(f"checkpoint behind step {event.step}")
                elif isinstance(event, Finished):
                    finished = event
        except KeyboardInterrupt:
            run.close()
            view.say(f"Stopped behind step {tracker.step}; --resume goes on from there.")
            raise
    return finished


class _Tracker:
    """What a view shows of a run."""

    def __init__(self):
        self.total = self.step = self.tokens = 0
        self.validation: float | None = None
        self.best: float | None = None
        self.last: StepDone | None = None

    def start(self, event: Started) -> None:
        self.total, self.first = event.steps, event.done
        self.began = time.monotonic()

    def add(self, event: StepDone) -> None:
        self.step, self.last = event.step, event
        if event.validation_loss is not None:
            self.validation = event.validation_loss
            self.best = min(self.validation, self.best if self.best is not None else self.validation)

    def facts(self) -> dict[str, str]:
        event = self.last
        passed = (time.monotonic() - self.began) / max(1, self.step - self.first)
        shown = {"loss": f"{event.loss:.4f}"}
        if self.validation is not None:
            shown["validation"] = f"{self.validation:.4f} (best {self.best:.4f})"
        return shown | {
            "tokens/s": f"{event.tokens_per_second:.0f}",
            "memory": f"{event.peak_memory_bytes / 1e6:.0f} MB",
            "left": _time(passed * (self.total - self.step)),
        }

    def line(self) -> str | None:
        """For who reads a log: what was validated, and the last step."""
        if self.last.validation_loss is None and self.step != self.total:
            return None
        facts = self.facts() | ({} if self.step != self.total else {"left": "nothing"})
        return f"step {self.step} of {self.total}: " + ", ".join(f"{name} {value}" for name, value in facts.items())


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _plan(event: Started, backend: str) -> str:
    again = f", going on behind step {event.done}" if event.done else ""
    remat = "activations computed twice" if event.remat else "activations kept"
    if event.done == event.steps > 0:
        return "This run has ended already."
    return (
        f"{event.parameters / 1e6:.2f} M parameters, {event.steps} steps on {backend}{again}; "
        f"{event.micro_batch} at once, {remat}: about {event.memory / 1e6:.0f} MB."
    )


def _ending(event: Finished, out: Path) -> str:
    said = f"{out} holds the state behind step {event.kept}"
    if event.validation_loss is not None:
        said += f", the best of {event.step}: validation loss {event.validation_loss:.4f}"
    return said + ("; stopped early, as validation no longer improved." if event.stopped_early else ".")


def _initial(adapter: str | None, session: Any, settings: Settings) -> dict | None:
    from ..train.artifacts import factors_of

    return None if adapter is None else factors_of(adapter, session, settings)


def _draw(out: Path) -> None:
    """The curves beside metrics.jsonl."""
    from ..train.curves import draw

    if drawn := draw(out):
        console.status(f"The curves are drawn in {drawn}.")
