"""What was tried and what it gave, for people: REPORT.md and a picture, inside the new folder."""

from __future__ import annotations

from pathlib import Path

from ... import pictures
from ...errors import Unavailable
from .events import TIME_WAS_UP, Outcome, Result
from .options import Options

PICTURE = "report.png"


def write_report(folder: Path, result: Result, options: Options) -> None:
    drawn = draw(folder / PICTURE, result, options)
    sizes = f"{result.original.nbytes / 1e6:.1f} MB; at most {options.target_bytes / 1e6:.1f} MB were asked for."
    lines = [
        "# How this model was made smaller",
        "",
        f"The original takes {sizes}",
        f"Kept: **{result.chosen}**. Loss: nats a token more than the original takes for text that no plan was shown.",
        "",
        *((TIME_WAS_UP, "") * result.hurried),
        "| plan | MB | million parameters | loss | expected | bits a byte | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(outcome) for outcome in (result.original, *result.outcomes)),
        "",
        *_list("Cut, with all bits kept", [_row(outcome) for outcome in result.cuts]),
        *_list("No time was left for", [f"| {e.plan} | | | | {_foretold(e.loss)} | | |" for e in result.left]),
        *(f"![size against loss]({PICTURE})" for _ in range(drawn)),
    ]
    (folder / "REPORT.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _list(title: str, rows: list[str]) -> list[str]:
    header = ["| plan | MB | million parameters | loss | expected | bits a byte | seconds |"]
    return [f"{title}:", "", *header, "| --- | --- | --- | --- | --- | --- | --- |", *rows, ""] if rows else []


def _row(o: Outcome) -> str:
    if o.failed:
        return f"| {o.plan} | {o.failed} | | | | | {o.seconds:.0f} |"
    sizes = f"{o.nbytes / 1e6:.1f} | {o.parameters / 1e6:.1f}"
    if o.loss is None:
        return f"| {o.plan} | {sizes} | not measured | | | {o.seconds:.0f} |"
    return f"| {o.plan} | {sizes} | {o.loss:.4f} | {_foretold(o.expected)} | {o.bits_per_byte:.4f} | {o.seconds:.0f} |"


def _foretold(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def frontier(outcomes: list[Outcome]) -> list[Outcome]:
    """Those that nothing smaller beats, by size."""
    best: list[Outcome] = []
    for outcome in sorted(outcomes, key=lambda o: (o.nbytes, o.loss)):
        if not best or outcome.loss < best[-1].loss:
            best.append(outcome)
    return best


def draw(path: Path, result: Result, options: Options) -> bool:
    """Whether there is a picture now: not without matplotlib, nor where nothing but the original was measured."""
    made = [outcome for outcome in (*result.outcomes, *result.cuts, result.original) if outcome.loss is not None]
    best = frontier(made)
    foretold = [estimate for estimate in result.left if estimate.loss is not None]
    series = {
        "frontier": [_point(o) for o in best],
        "carried out": [_point(o) for o in result.outcomes if o in made and o not in best],
        "cut, all bits kept": [_point(o) for o in result.cuts if o in made and o not in best],
        "expected": [(options.target_bytes / 1e6, estimate.loss, estimate.plan) for estimate in foretold],
    }
    series = {name: points for name, points in series.items() if points}
    if len(made) < 2:
        return False
    try:
        pictures.points(path, "Size against loss", series, "MB", "nats a token more than the original", ("frontier",))
    except Unavailable:
        return False
    return True


def _point(o: Outcome) -> tuple[float, float, str]:
    return o.nbytes / 1e6, o.loss, o.plan
