"""Teaching side by side with peft, interleaved in one run: LoRA of rank 8 on every linear map.

    python benchmarks/train.py FOLDER --peft /path/to/venv/bin/python [--quantized MODEL.gguf] [--rounds 3]
                               [--ways float32]

FOLDER is a Hugging Face folder that both read; --quantized names the same model in four bits, which is trained with
rematerialisation. Each round starts every contestant afresh, in turn. A table: tokens/s and peak memory (medians over
the rounds), and ours over theirs by round. A step of ours is all that `lora-train` does; of peft's: forward, backward,
AdamW. --ways leaves out those of peft's settings that are not named: where bfloat16 products are emulated, they take
minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from compare import run

PEER = Path(__file__).parent / "peer_peft.py"
WAYS = {"float32": ["float32"], "bfloat16": ["bfloat16"], "float32 checkpoint": ["float32", "checkpoint"]}


def ours(model: str, args: argparse.Namespace, *more: str) -> dict:
    """Medians of `lora-train`'s own metrics, without the first step."""
    with tempfile.TemporaryDirectory() as folder:
        data, dest = Path(folder, "data.jsonl"), Path(folder, "adapter")
        lines = (" ".join(str(i * 7919 + j) for j in range(args.tokens)) for i in range(2 * args.batch_size))
        data.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        numbers = {"rank": 8, "batch-size": args.batch_size, "max-length": args.tokens, "steps": args.steps}
        options = [part for name, value in numbers.items() for part in (f"--{name}", str(value))]
        command = [
            sys.executable,
            "-m",
            "ondevice",
            "lora-train",
            model,
            str(data),
            "--out",
            str(dest),
            "--backend",
            "cpu",
        ]
        done = subprocess.run([*command, "--validation", "0", *options, *more], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        steps = [json.loads(line) for line in (dest / "metrics.jsonl").read_text().splitlines()][1:]
    return {
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in steps),
        "peak_memory_bytes": max(step["peak_memory_bytes"] for step in steps),
    }


def peft(way: list[str], args: argparse.Namespace) -> dict:
    dtype, *more = way
    numbers = map(str, (args.batch_size, args.tokens, args.steps, args.threads))
    return run([args.peft, str(PEER), args.model, dtype, *numbers, *more])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="FOLDER")
    parser.add_argument("--peft", metavar="PYTHON", help="an interpreter that has peft and transformers")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="peft's settings (all of them)")
    parser.add_argument("--quantized", metavar="MODEL")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    contestants = {"ondevice": lambda: ours(args.model, args, "--no-remat")}
    if args.quantized:
        contestants["ondevice, 4 bits, remat"] = lambda: ours(args.quantized, args, "--remat")
    for name in args.ways if args.peft else ():
        contestants[f"peft {name}"] = lambda way=WAYS[name]: peft(way, args)
    rounds: dict[str, list[dict]] = {name: [] for name in contestants}
    for number in range(args.rounds):
        for name, contestant in contestants.items():
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
            rounds[name].append(contestant())
    table = [row(name, found, rounds["ondevice"]) for name, found in rounds.items()]
    print(json.dumps(table, indent=1) if args.json else "\n".join(map(spell, table)))


def row(name: str, theirs: list[dict], us: list[dict]) -> dict:
    def ratio(figure: str) -> float:
        return statistics.median(o[figure] / t[figure] for o, t in zip(us, theirs, strict=True))

    medians = {figure: statistics.median(t[figure] for t in theirs) for figure in theirs[0]}
    return {"name": name, **medians, "speed": ratio("tokens_per_second"), "memory": ratio("peak_memory_bytes")}


def spell(result: dict) -> str:
    speed, memory = result["tokens_per_second"], result["peak_memory_bytes"] / 1e6
    return (
        f"{result['name']:24}{speed:8.1f} tokens/s {memory:8.0f} MB   ondevice: {result['speed']:.2f} x its speed, "
        f"{result['memory']:.2f} x its memory"
    )


if __name__ == "__main__":
    main()
