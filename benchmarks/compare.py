"""Side by side with peers, interleaved in one run, so that the machine's moods hit everyone alike.

    python benchmarks/compare.py MODEL.gguf --llama-cpp /path/to/venv/bin/python [--rounds 5]

A peer is an interpreter that has it installed: `--llama-cpp` one with llama-cpp-python, `--openvino` one with
openvino-genai, `--transformers` one with transformers (reads a Hugging Face folder given by --hf). Each round starts
every contestant afresh, in turn; the table gives medians over the rounds, their spread, and the median of the
round-by-round ratios to us. With several depths (--depth 64,4096) comes what is left of each one's speed at the last,
and llama.cpp runs with and without flash attention, for its best counts; --kv-bits 8 adds us with such a cache.
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


def contestants(args: argparse.Namespace) -> dict[str, list[str]]:
    """name -> the command that prints one JSON object, as `figures` reads it. Peers other than llama.cpp know one
    depth, the first."""
    numbers = [str(args.prompt_tokens), str(args.generate_tokens), args.depth, str(args.threads)]
    once = [*numbers[:2], args.depth.split(",")[0], numbers[3]]
    ours = [sys.executable, "-m", "ondevice", "bench", args.model, "--backend", args.backend, "--repeat", "2", "--json"]
    for option, value in zip(("prompt-tokens", "generate-tokens", "depth", "threads"), numbers, strict=True):
        ours += [f"--{option}", value]
    found = {"ondevice": ours}
    if args.kv_bits:
        found[f"ondevice kv {args.kv_bits}"] = [*ours, "--kv-bits", args.kv_bits]
    if args.llama_cpp:
        theirs = [args.llama_cpp, str(HERE / "peer_llama_cpp.py"), args.peer_model or args.model, *numbers]
        found["llama.cpp"] = theirs
        if "," in args.depth:
            found["llama.cpp no fa"] = [*theirs, "plain"]
    if args.openvino:
        found["openvino"] = [args.openvino, str(HERE / "peer_openvino.py"), args.model, *once]
    if args.transformers:
        found["transformers"] = [args.transformers, str(HERE / "peer_transformers.py"), args.hf, *once]
    return found


def figures(result: dict) -> dict[str, float]:
    """Tokens a second by what was measured, and at the last depth as a share of the first's."""
    found = {"prefill": result["prefill_tokens_per_second"]}
    depths = {d["depth"]: d["tokens_per_second"] for d in result.get("decode", ())}
    if len(depths) < 2:
        return found | {"decode": result["decode_tokens_per_second"]}
    first, last = min(depths), max(depths)
    kept = {f"{last} over {first}": depths[last] / depths[first]}
    return found | {f"decode at {depth}": speed for depth, speed in depths.items()} | kept


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
    parser.add_argument("--depth", default="0", metavar="N[,N…]", help="context before each decode")
    parser.add_argument("--kv-bits", help="us once more, with a cache of so many bits")
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
    own, beside = [figures(r) for r in theirs], [figures(r) for r in ours]
    for figure in own[0]:
        values = [r[figure] for r in own]
        ratios = [o[figure] / t[figure] for o, t in zip(beside, own, strict=True) if figure in o]
        result[figure] = {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "ours_over_it": statistics.median(ratios) if ratios else None,
        }
    return result


def spell(result: dict) -> str:
    lines = []
    for figure, f in result.items():
        if figure == "name":
            continue
        digits = 2 if "over" in figure else 1
        spread = f"({f['min']:.{digits}f} to {f['max']:.{digits}f})"
        ratio = "" if f["ours_over_it"] is None else f"  ondevice = {f['ours_over_it']:.2f} x"
        lines.append(f"{result['name']:16}{figure:15}{f['median']:8.{digits}f} {spread}{ratio}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
