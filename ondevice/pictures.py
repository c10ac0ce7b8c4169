"""Pictures for people: a few kinds of chart, the same look everywhere, written as .png, .svg or .pdf.

Drawn by matplotlib (the extra `plot`), loaded when the first picture is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from .checkpoint.write import write_file
from .errors import BadOption, Unavailable

SUFFIXES = (".png", ".svg", ".pdf")


def require(path: str | Path) -> Path:
    """The path of a picture to come, checked before any work is done for it. Raises BadOption for a kind of file that
    cannot be drawn or a folder that is not there, Unavailable without matplotlib."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise BadOption(f"{path} is not the name of a picture.", f"End it in {', '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise BadOption(f"There is no folder {path.parent} for {path.name}.", "Make it first, or give another place.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Unavailable("Pictures need the package matplotlib.", "pip install matplotlib") from None
    return path


def lines(
    path: str | Path, title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str,
    marks: Mapping[str, float] | None = None, log: bool = False,
) -> None:  # fmt: skip
    """series: name -> (x values, y values). marks: name -> x of a vertical line. log: the y axis."""
    with _figure(path, title, x, y) as axes:
        for name, (at, values) in series.items():
            axes.plot(at, values, label=name, marker="o" if len(at) < 20 else None, markersize=3)
        for name, where in (marks or {}).items():
            axes.axvline(where, color="0.5", linestyle="--", linewidth=1, label=name)
        if log:
            axes.set_yscale("log")
        _legend(axes)


def bars(path: str | Path, title: str, parts: Mapping[str, Mapping[str, float]], x: str, y: str) -> None:
    """Stacked bars. parts: name of the part -> (name of the bar -> height); bars in order of first mention."""
    names = list(dict.fromkeys(bar for heights in parts.values() for bar in heights))
    with _figure(path, title, x, y, width=max(7.0, 0.28 * len(names))) as axes:
        bottoms = [0.0] * len(names)
        for part, heights in parts.items():
            tall = [float(heights.get(name, 0.0)) for name in names]
            axes.bar(range(len(names)), tall, bottom=bottoms, label=part)
            bottoms = [b + h for b, h in zip(bottoms, tall, strict=True)]
        axes.set_xticks(range(len(names)), names, rotation=0 if len(names) < 8 else 90)
        if len(parts) > 1:
            _legend(axes)


def points(
    path: str | Path, title: str, series: Mapping[str, Sequence[tuple[float, float, str]]], x: str, y: str,
    joined: Sequence[str] = (), log: bool = False,
) -> None:  # fmt: skip
    """Scattered points (x, y, label) by series; those of the series named in `joined` are joined by a line."""
    with _figure(path, title, x, y) as axes:
        notes = []
        for name, places in series.items():
            across, up, labels = zip(*sorted(places), strict=True) if places else ((), (), ())
            axes.plot(across, up, marker="o", linestyle="-" if name in joined else "", label=name)
            for place, label in zip(zip(across, up, strict=True), labels, strict=True):
                notes.append(axes.annotate(label, place, xytext=(4, 4), textcoords="offset points", fontsize=7))
        if log:
            axes.set_yscale("log")
        _legend(axes)
        _apart(axes, notes)


def heat(
    path: str | Path, title: str, values: Sequence[Sequence[float]], x: str, y: str,
    columns: Sequence[str] = (), rows: Sequence[str] = (), scale: str = "",
) -> None:  # fmt: skip
    """A table of numbers [rows, columns] as colours; `scale` says what the colour means."""
    tall, wide = len(values), max(len(row) for row in values)
    with _figure(path, title, x, y, max(7.0, 0.2 * wide), max(4.5, 0.2 * tall)) as axes:
        shown = axes.imshow(values, aspect="auto", interpolation="nearest")
        axes.figure.colorbar(shown, label=scale)
        if columns:
            axes.set_xticks(range(len(columns)), columns, rotation=90 if len(columns) > 8 else 0)
        if rows:
            axes.set_yticks(range(len(rows)), rows)
        axes.grid(False)


def _apart(axes: Any, notes: Sequence[Any]) -> None:
    """Moves labels up that would lie over others."""
    axes.figure.draw_without_rendering()
    placed: list[Any] = []
    for box, note in sorted(((n.get_window_extent(), n) for n in notes), key=lambda pair: pair[0].y0):
        lift = 0.0
        for other in sorted(placed, key=lambda other: other.y0):
            if box.translated(0, lift).overlaps(other):
                lift = other.y1 - box.y0 + 1
        placed.append(box.translated(0, lift))
        note.set_position((4, 4 + lift * 72 / axes.figure.dpi))


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)


@contextmanager
def _figure(path: str | Path, title: str, x: str, y: str, width: float = 7.0, height: float = 4.5) -> Iterator[Any]:
    """Axes to draw on; afterwards the picture stands at `path`, whole or not at all."""
    path = require(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(width, 40.0), min(height, 40.0)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix.lower()[1:])
    write_file(path, drawn.getvalue())
