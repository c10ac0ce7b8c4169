"""Dates in words -> ISO 8601, as data to teach a small model: python examples/dates.py FOLDER

Writes train.jsonl, valid.jsonl and test.jsonl; no date stands in two of them.
"""

from __future__ import annotations

import json
import random
import sys
from datetime import date, timedelta
from pathlib import Path

SIZES = {"train": 3000, "valid": 60, "test": 200}
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth",
}  # fmt: skip
FORMS = ("the {day} of {month}, {year}", "{month} {day}, {year}", "{weekday}, {month} the {day}, {year}")


def words(number: int) -> str:
    """0 to 99."""
    if number < 20:
        return SMALL[number]
    ten = TENS[number // 10 - 2]
    return ten if number % 10 == 0 else f"{ten}-{SMALL[number % 10]}"


def ordinal(number: int) -> str:
    head, dash, last = words(number).rpartition("-")
    if last in ORDINALS:
        return head + dash + ORDINALS[last]
    return head + dash + (last[:-1] + "ieth" if last.endswith("y") else last + "th")


def year(number: int) -> str:
    century, rest = divmod(number, 100)
    if century == 20 and rest < 10:
        return "two thousand" + (f" and {words(rest)}" if rest else "")
    if rest == 0:
        return f"{words(century)} hundred"
    return f"{words(century)} {'oh ' if rest < 10 else ''}{words(rest)}"


def example(day: date, draw: random.Random) -> dict:
    spoken = draw.choice(FORMS).format(
        day=ordinal(day.day), month=f"{day:%B}", year=year(day.year), weekday=f"{day:%A}"
    )
    return {
        "messages": [
            {"role": "system", "content": "Write the date as ISO 8601."},
            {"role": "user", "content": spoken},
            {"role": "assistant", "content": day.isoformat()},
        ]
    }


def splits(seed: int = 0) -> dict[str, list[dict]]:
    draw = random.Random(seed)
    first, last = date(1800, 1, 1), date(2049, 12, 31)
    days = draw.sample(range((last - first).days + 1), sum(SIZES.values()))
    lines = iter([example(first + timedelta(day), draw) for day in days])
    return {name: [next(lines) for _ in range(size)] for name, size in SIZES.items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in splits().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
