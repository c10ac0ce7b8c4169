"""ondevice and mlx-lm side by side on a Mac, in one process, round by round in turn.

    python benchmarks/mac.py [MODEL] [--bits 4]

MODEL is a Hugging Face repo id or folder, read by both from the same files; --bits quantizes it first (with mlx-lm, to
.cache/mac). Prints medians and spread of prefill and decode, ours over theirs, and whether the greedy answers agree.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from ondevice import hub
from ondevice.runtime.engine import GenerateOptions, Token
from ondevice.runtime.session import open_session

DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
Answer = tuple[float, float, list[int]]  # seconds to the first token, seconds for the others, ids


def ours(folder: Path, exact: bool, capacity: int) -> Callable[[list[int], int], Answer]:
    engine = open_session(str(folder), backend="mlx", exact=exact, context=capacity).engine

    def answer(prompt: list[int], count: int) -> Answer:
        engine.reset()
        options = GenerateOptions(max_tokens=count, stop_ids=frozenset())
        started, times, ids = time.perf_counter(), [], []
        for event in engine.generate(prompt, options):
            if isinstance(event, Token):
                times.append(time.perf_counter())
                ids.append(event.id)
        return times[0] - started, times[-1] - times[0], ids

    return answer


def theirs(folder: Path, exact: bool) -> Callable[[list[int], int], Answer]:
    model, _ = load_model(folder)
    if exact:
        model.set_dtype(mx.float32)

    def answer(prompt: list[int], count: int) -> Answer:
        started, times, ids = time.perf_counter(), [], []
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=count):
            times.append(time.perf_counter())
            ids.append(int(token))
        return times[0] - started, times[-1] - times[0], ids

    return answer


def quantized(folder: Path, bits: int) -> Path:
    """The model in groups of 64, made once."""
    made = Path(".cache/mac") / f"{folder.resolve().name}-{bits}bit"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        mlx_lm.convert(str(folder), str(made), quantize=True, q_bits=bits, q_group_size=64)
    return made


def measure(args: argparse.Namespace, contestants: dict[str, Callable]) -> dict[str, list[Answer]]:
    """One answer of each that does not count, then --rounds of all in turn; the same prompt in each round."""
    draw, rounds = np.random.default_rng(0), {name: [] for name in contestants}
    for number in range(args.rounds + 1):
        prompt = draw.integers(100, 10_000, args.prompt_tokens).tolist()
        for name, answer in contestants.items():
            result = answer(prompt, args.generate_tokens)
            if number:
                rounds[name].append(result)
    return rounds


def figures(args: argparse.Namespace, answers: list[Answer]) -> dict[str, list[float]]:
    return {
        "prefill_tokens_per_second": [args.prompt_tokens / first for first, _, _ in answers],
        "decode_tokens_per_second": [(args.generate_tokens - 1) / rest for _, rest, _ in answers],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 5, 6, 8))
    parser.add_argument("--exact", action="store_true", help="both in float32")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--generate-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = Path(hub.resolve(args.model))
    folder = quantized(folder, args.bits) if args.bits else folder
    capacity = args.prompt_tokens + args.generate_tokens
    rounds = measure(args, {"ondevice": ours(folder, args.exact, capacity), "mlx-lm": theirs(folder, args.exact)})
    us, them = (figures(args, answers) for answers in rounds.values())
    report = {
        "model": str(folder), "machine": mx.device_info().get("device_name", platform.machine()),
        "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, "rounds": args.rounds,
        "same_ids": sum(a[2] == b[2] for a, b in zip(*rounds.values(), strict=True)),
    }  # fmt: skip
    for name, values in us.items():
        ratios = [a / b for a, b in zip(values, them[name], strict=True)]
        report[name] = {
            who: {"median": statistics.median(v), "min": min(v), "max": max(v)}
            for who, v in {"ondevice": values, "mlx-lm": them[name], "ratio": ratios}.items()
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
