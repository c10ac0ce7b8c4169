"""Side by side with peers, interleaved in one run, so that the machine's moods hit everyone alike.

    python benchmarks/compare.py MODEL.gguf --llama-cpp /path/to/venv/bin/python [--rounds 5]

A peer is an interpreter that has it installed: `--llama-cpp` one with llama-cpp-python, `--openvino` one with
openvino-genai, `--transformers` one with transformers (reads a Hugging Face folder given by --hf). Each round starts
every contestant afresh, in turn; the table gives medians over the rounds, their spread, and the median of the
round-by-round ratios to us.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FIGURES = ("prefill_tokens_per_second", "decode_tokens_per_second")


def contestants(args: argparse.Namespace) -> dict[str, list[str]]:
    """name -> the command that prints one JSON object with FIGURES."""
    numbers = [str(args.prompt_tokens), str(args.generate_tokens), str(args.depth), str(args.threads)]
    ours = [sys.executable, "-m", "ondevice", "bench", args.model, "--backend", args.backend, "--repeat", "2", "--json"]
    for option, value in zip(("prompt-tokens", "generate-tokens", "depth", "threads"), numbers, strict=True):
        ours += [f"--{option}", value]
    found = {"ondevice": ours}
    if args.llama_cpp:
        found["llama.cpp"] = [args.llama_cpp, str(HERE / "peer_llama_cpp.py"), args.peer_model or args.model, *numbers]
    if args.openvino:
        found["openvino"] = [args.openvino, str(HERE / "peer_openvino.py"), args.model, *numbers]
    if args.transformers:
        found["transformers"] = [args.transformers, str(HERE / "peer_transformers.py"), args.hf, *numbers]
    return found


def run(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--peer-model", help="another file for llama.cpp (default: the same)")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--openvino", metavar="PYTHON")
    parser.add_argument("--transformers", metavar="PYTHON")
    parser.add_argument("--hf", metavar="FOLDER", help="the model as transformers reads it")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--generate-tokens", type=int, default=64)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    commands = contestants(args)
    rounds: dict[str, list[dict]] = {name: [] for name in commands}
    for number in range(args.rounds):
        for name, command in commands.items():
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
            rounds[name].append(run(command))
    table = [row(name, rounds[name], rounds["ondevice"]) for name in commands]
    print(json.dumps(table, indent=1) if args.json else "\n".join(map(spell, table)))


def row(name: str, theirs: list[dict], ours: list[dict]) -> dict:
    result: dict = {"name": name}
    for figure in FIGURES:
        values = [r[figure] for r in theirs]
        ratios = [o[figure] / t[figure] for o, t in zip(ours, theirs, strict=True)]
        result[figure] = {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "ours_over_it": statistics.median(ratios),
        }
    return result


def spell(result: dict) -> str:
    parts = []
    for figure in FIGURES:
        f = result[figure]
        kind = figure.split("_")[0]
        spread = f"({f['min']:.1f} to {f['max']:.1f})"
        parts.append(f"{kind} {f['median']:8.1f} {spread}  ondevice = {f['ours_over_it']:.2f} x")
    return f"{result['name']:14}" + "   ".join(parts)


if __name__ == "__main__":
    main()
