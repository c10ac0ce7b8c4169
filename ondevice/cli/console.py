"""The only file that prints. Answers go to stdout, status and progress to stderr: a line that changes on a terminal, a
plain one now and then in a log."""

from __future__ import annotations

import json as _json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import OnDeviceError

NARROW = 80  # columns below which texts do not stand side by side
WATCHED, LOGGED = 0.1, 15.0  # seconds between two looks at progress: on a terminal, in a file or pipe
_drawn = 0  # characters of a progress line that stands on the terminal now


def answer(text: str = "", *, end: str = "\n") -> None:
    """Part of what was asked for; shown at once."""
    try:
        sys.stdout.write(text + end)
    except UnicodeEncodeError:  # a terminal that cannot show a character still gets the rest
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write((text + end).encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def json(value: Any) -> None:
    """One JSON document on stdout, the only thing a --json command writes there; ASCII, whatever the terminal's
    encoding. What is no finite number is null: JSON has no other word for it."""
    answer(_json.dumps(_plain(value), allow_nan=False))


def _plain(value: Any) -> Any:
    """NumPy's numbers, paths and infinities, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def status(text: str = "", *, end: str = "\n") -> None:
    """What is going on, for people."""
    _draw("")
    sys.stderr.write(text + end)
    sys.stderr.flush()


def _draw(text: str) -> None:
    """Replaces the progress line; an empty text wipes it."""
    global _drawn
    if text or _drawn:
        sys.stderr.write("\r" + text.ljust(_drawn) + ("" if text else "\r"))
        sys.stderr.flush()
        _drawn = len(text)


def error(problem: OnDeviceError) -> None:
    """Two lines: what and where; what to do."""
    status(f"Error: {_line(problem.message)}")
    if problem.hint:
        status(_line(problem.hint))


def _line(text: str) -> str:
    """One line, with nothing in it that a terminal would obey: names out of strange files end up in messages."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.splitlines()))


def flush() -> None:
    sys.stdout.flush()


def abandon_stdout() -> None:
    """After a broken pipe: keeps the interpreter from failing once more when it closes stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def interactive() -> bool:
    """Someone is reading stderr on a terminal."""
    return sys.stderr.isatty()


def ask(prompt: str) -> str:
    """A line from the terminal; with readline loaded, one that can be edited. The prompt never gets into a file that
    stdout goes to. Raises EOFError at the end."""
    if sys.stdout.isatty():
        return input(prompt)
    status(prompt, end="")
    return input()


def table(rows: list[tuple[str, ...]], header: tuple[str, ...] = ()) -> None:
    """Left-aligned columns on stdout."""
    lines = [tuple(map(str, row)) for row in ([header] if header else []) + rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))] if lines else []
    for line in lines:
        answer("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def taught(what: str, facts: Mapping[str, Any]) -> None:
    """What a model was before it was taught by its original, and after."""
    rows = []
    for name in ("original", "before", "after"):
        kl = facts[name]["kl"]
        figures = (f"{facts[name]['perplexity']:.2f}", f"{facts[name]['bits_per_byte']:.4f}")
        rows.append((name, *figures, "" if kl is None else f"{kl:.4f}"))
    table(rows, (what, "perplexity", "bits/byte", "KL"))
    kept = f"{facts['steps']} steps in {facts['seconds']:.0f} s, the state behind step {facts['kept']} kept"
    part = "" if facts["share"] == 1 else f", {facts['share']:.0%} of what was learnt worked in"
    answer(f"{kept}{part}; measured on text that was held out.")


def side_by_side(texts: list[tuple[str, str]]) -> None:
    """Titles and texts on stdout: in columns on a terminal that is wide enough, one after the other elsewhere."""
    import shutil

    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    if columns < NARROW:
        for title, text in texts:
            answer(f"{title}:\n{text}\n")
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(*(Column(title, ratio=1) for title, _ in texts), width=columns)
    table.add_row(*(Text(text) for _, text in texts))
    Console(file=sys.stdout, width=columns).print(table)


def heading(title: str) -> None:
    """A line that begins a part of a long answer."""
    answer()
    _print([(title, "bold")])


def shaded(parts: list[tuple[str, float]]) -> None:
    """A text in pieces, each on a ground as dark as its share (0 to 1); just the text where there are no colours."""
    _print(
        [
            (text, f"black on rgb(255,{255 - int(150 * share)},{255 - int(255 * share)})" if share > 0.02 else "")
            for text, share in parts
        ]
    )


def _print(parts: list[tuple[str, str]]) -> None:
    """Text with styles, on stdout."""
    from io import StringIO

    from rich.console import Console
    from rich.text import Text

    drawn = Console(file=StringIO(), force_terminal=sys.stdout.isatty())
    drawn.print(Text.assemble(*parts), soft_wrap=True)
    answer(drawn.file.getvalue(), end="")


@contextmanager
def resumable(what: str = "What is finished", kept: bool = True) -> Iterator[None]:
    """Around work that goes on where it was interrupted, which is said then; kept: whether this one does."""
    try:
        yield
    except KeyboardInterrupt:
        if kept:
            status(f"{what} is kept: the same command goes on from there.")
        raise


class progress:
    """A line on stderr that shows how far long work is and how long it will take; where stderr is no terminal, a new
    line every 15 seconds at most, so that short work leaves none.

    with progress("Fetching", unit="bytes") as p: p.update(done, total)
    """

    def __init__(self, title: str, unit: str = "", shown: float | None = None):
        """shown: when a line was last shown (of the stage before); None: time counts from now."""
        self.title, self.unit = title, unit
        self.started = time.monotonic()
        self.shown = self.started if shown is None else shown
        self.visible = interactive()

    def __enter__(self) -> progress:
        return self

    def update(self, done: float, total: float | None = None) -> None:
        now = time.monotonic()
        due = now - self.shown >= (WATCHED if self.visible else LOGGED)
        if not due and not (self.visible and done == total):
            return
        self.shown = now
        line = f"{self.title}: {self._amounts(done, total)}{self._left(done, total, now)}"
        _draw(line) if self.visible else status(line)

    def _amounts(self, done: float, total: float | None) -> str:
        scale, unit = (1e6, "MB") if self.unit == "bytes" else (1, self.unit)
        text = f"{done / scale:.0f}" + (f" of {total / scale:.0f}" if total else "")
        return f"{text} {unit}".rstrip()

    def _left(self, done: float, total: float | None, now: float) -> str:
        if not total or not done or done >= total or now - self.started < 1:
            return ""
        seconds = (now - self.started) / done * (total - done)
        return f", {seconds:.0f} s left" if seconds < 90 else f", {seconds / 60:.0f} min left"

    def __exit__(self, *_: object) -> None:
        _draw("")


class stages:
    """Progress lines one after the other, one a stage of long work.

    with stages() as show: show(event), whose stage, done, total and unit say where the work is
    """

    def __enter__(self) -> stages:
        self.stage, self.line = "", None
        return self

    def __call__(self, event: Any) -> None:
        if event.stage != self.stage:
            self.__exit__()
            shown = self.line and self.line.shown
            self.stage, self.line = event.stage, progress(event.stage, event.unit, shown)
        self.line.update(event.done, event.total)

    def __exit__(self, *_: object) -> None:
        _draw("")


class dashboard:
    """A live view of long work on a terminal: a bar, a few facts, how a number ran; where nobody watches, one line now
    and then.

    with dashboard("Training") as view: view.show(done, total, {"loss": "1.23"}, line)
    """

    WIDTH = 60  # characters of the curve

    def __init__(self, title: str):
        self.title, self.live = title, None
        self.facts: dict[str, str] = {}
        self.curve: list[float] = []
        self.done = self.total = 0
        self.hint = ""

    def __enter__(self) -> dashboard:
        if interactive():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(file=sys.stderr), refresh_per_second=4, get_renderable=self._drawing)
            self.live.start()
        return self

    def show(self, done: int, total: int, facts: dict[str, str], line: str | None, value: float) -> None:
        """line: for who reads a log; None: not worth one. value: the next point of the curve."""
        self.done, self.total, self.facts, self.hint = done, total, facts, ""
        self.curve.append(value)
        if self.live is None and line:
            status(line)

    def say(self, text: str) -> None:
        """A line that stays, above the view."""
        self.live.console.print(text, markup=False, highlight=False) if self.live else status(text)

    def note(self, text: str) -> None:
        """What goes on between two shows."""
        self.hint = text

    def _drawing(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self.title, style="bold"), ProgressBar(total=max(self.total, 1), completed=self.done, width=32),
            Text(f"{self.done} of {self.total}"), Text(self.hint, style="dim"),
        )  # fmt: skip
        facts = Table.grid(padding=(0, 3))
        facts.add_row(*(Text.assemble((f"{name} ", "dim"), value) for name, value in self.facts.items()))
        return Group(head, facts, Text(_sparks(self.curve, self.WIDTH), style="cyan"))

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()


def _sparks(values: list[float], width: int) -> str:
    """A curve in one line: each character the mean of its share of the values."""
    if not values:
        return ""
    count = min(width, len(values))
    means = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (m - low) / (high - low))] if high > low else "▁" for m in means)
