"""What was tried and what it gave, for people: REPORT.md and a picture, inside the new folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ... import pictures
from ...errors import Unavailable
from .options import Options

if TYPE_CHECKING:
    from .running import Outcome, Result

PICTURE = "report.png"


def write_report(folder: Path, result: Result, options: Options) -> None:
    drawn = draw(folder / PICTURE, result)
    sizes = f"{result.original.nbytes / 1e6:.1f} MB; at most {options.target_bytes / 1e6:.1f} MB were asked for."
    lines = [
        "# How this model was made smaller",
        "",
        f"The original takes {sizes}",
        f"Kept: **{result.chosen}**. Loss: nats more than the original takes for a token of held-out text.",
        "",
        "| plan | MB | million parameters | loss | bits a byte | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_row(outcome) for outcome in (result.original, *result.outcomes)),
        "",
        *(f"No time was left for: {', '.join(result.left)}." for _ in result.left[:1]),
        *(f"![size against loss]({PICTURE})" for _ in range(drawn)),
    ]
    (folder / "REPORT.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(o: Outcome) -> str:
    if o.failed:
        return f"| {o.plan} | {o.failed} | | | | {o.seconds:.0f} |"
    sizes = f"{o.nbytes / 1e6:.1f} | {o.parameters / 1e6:.1f}"
    return f"| {o.plan} | {sizes} | {o.loss:.4f} | {o.bits_per_byte:.4f} | {o.seconds:.0f} |"


def frontier(outcomes: list[Outcome]) -> list[Outcome]:
    """Those that nothing smaller beats, by size."""
    best: list[Outcome] = []
    for outcome in sorted(outcomes, key=lambda o: (o.nbytes, o.loss)):
        if not best or outcome.loss < best[-1].loss:
            best.append(outcome)
    return best


def draw(path: Path, result: Result) -> bool:
    """Whether there is a picture now: not without matplotlib."""
    made = [outcome for outcome in (*result.outcomes, result.original) if not outcome.failed]
    best = frontier(made)
    series = {
        "frontier": [(o.nbytes / 1e6, o.loss, o.plan) for o in best],
        "plans": [(o.nbytes / 1e6, o.loss, o.plan) for o in made if o not in best],
    }
    try:
        pictures.points(path, "Size against loss", series, "MB", "nats a token more than the original", ("frontier",))
    except Unavailable:
        return False
    return True
