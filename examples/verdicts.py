"""Reviews and verdicts, a quarter of them wrong, as data that a small model soon learns by heart.

python examples/verdicts.py FOLDER writes train.jsonl, valid.jsonl and test.jsonl (without mistakes); no review stands
in two of them. The rule can be learnt; the mistakes of train.jsonl can only be remembered, which helps nowhere else.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

SIZES = {"train": 40, "valid": 48, "test": 100}
MISTAKES = {"train": 0.25, "valid": 0.25, "test": 0.0}
THINGS = "soup hotel film phone train coat book lamp hike lesson bike cake".split()
WORDS = {
    "good": "splendid superb charming lovely flawless delightful".split(),
    "bad": "dreadful awful broken dull filthy useless".split(),
}
FORMS = ("The {thing} was {word}.", "What a {word} {thing}!", "I found the {thing} {word}.")


def splits(seed: int = 0) -> dict[str, list[dict]]:
    draw = random.Random(seed)
    every = [
        (form.format(thing=thing, word=word), verdict)
        for verdict, words in WORDS.items()
        for form, thing, word in itertools.product(FORMS, THINGS, words)
    ]
    reviews = iter(draw.sample(every, sum(SIZES.values())))
    return {name: [_line(*next(reviews), MISTAKES[name], draw) for _ in range(size)] for name, size in SIZES.items()}


def _line(review: str, verdict: str, mistakes: float, draw: random.Random) -> dict:
    if draw.random() < mistakes:
        verdict = "bad" if verdict == "good" else "good"
    return {"prompt": f"Review: {review}\nVerdict:", "completion": f" {verdict}"}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in splits().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
