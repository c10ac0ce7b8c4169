"""Feeds mutated model files to the readers: `python fuzz_readers.py FOLDER FIRST COUNT`, one seed a case.

Allowed: success, or an OnDeviceError of two lines. Anything else (another exception, a case of more than five seconds,
memory beyond what small files can need, a crash) ends the process with a status that isn't 0. The test runs it as a
process of its own, so that a crash is seen and limits hold.
"""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ondevice import schemes
from ondevice.checkpoint import open_checkpoint, verify
from ondevice.errors import OnDeviceError
from ondevice.tools.convert import convert, plan
from tests.files.small_models import write_gguf, write_hf, write_llama

GROWTH_LIMIT = 200 << 20
INTERESTING = [0, 1, 7, 8, 31, 32, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63,
               (1 << 64) - 1]  # fmt: skip
VALUES = ["-1", "0", "1e999", "NaN", "null", "true", '"x"', "[]", "{}", "3.5", '"../x.safetensors"', '"\\ud800"',
          "9223372036854775808", "1" * 5000]  # fmt: skip


def originals(folder: Path) -> dict[str, tuple[Path, Path]]:
    """name -> (what to open, the file to mutate)."""
    write_gguf(folder / "all.gguf")
    write_gguf(folder / "few.gguf", ("Q4_0", "Q6_K"), tokens=3)
    write_hf(folder / "one")
    write_hf(folder / "two", 2)
    quantized = folder / "mlx"
    quantized.mkdir()
    tensor = schemes.quantize_affine(np.ones((4, 64), np.float32), 4, 32, "float16")
    save_file({f"m.{part}": values for part, values in tensor.parts.items()}, quantized / "model.safetensors")
    settings = {"bits": 4, "group_size": 32, "m": {"bits": 4, "group_size": 32}}
    (quantized / "config.json").write_text(json.dumps({"quantization": settings}))
    write_llama(folder / "llama.gguf", "Q4_K")
    with open_checkpoint(folder / "llama.gguf") as model:
        convert(plan(model, "float16"), folder / "llama")
    return {
        "gguf": (folder / "all.gguf", folder / "all.gguf"),
        "small gguf": (folder / "few.gguf", folder / "few.gguf"),
        "safetensors": (folder / "one", folder / "one" / "model.safetensors"),
        "shard": (folder / "two", folder / "two" / "model-00002.safetensors"),
        "index": (folder / "two", folder / "two" / "model.safetensors.index.json"),
        "config": (folder / "mlx", folder / "mlx" / "config.json"),
        "mlx": (folder / "mlx", folder / "mlx" / "model.safetensors"),
        "whole gguf": (folder / "llama.gguf", folder / "llama.gguf"),
        "whole config": (folder / "llama", folder / "llama" / "config.json"),
    }


def mutate(rng: random.Random, raw: bytes) -> bytes:
    """One to four changes; most fall in the first bytes, where the header is."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(min(len(data), rng.choice([32, 400, 3000, 1 << 30])) or 1)
        match rng.randrange(8):
            case 0 if data:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                data[at : at + 8] = rng.choice(INTERESTING).to_bytes(8, "little")
            case 3:
                data[at : at + 4] = (rng.choice(INTERESTING) & 0xFFFFFFFF).to_bytes(4, "little")
            case 4:
                del data[at : at + rng.choice([1, 8, 40, len(data)])]
            case 5:
                data[at:at] = data[at : at + rng.randrange(1, 60)]
            case _:
                data = _mutate_json(rng, data)
    return bytes(data)


def _mutate_json(rng: random.Random, data: bytearray) -> bytearray:
    """Another value in the place of a number or string of the JSON, with the header's length put right."""
    places = list(re.finditer(rb'-?\d+|"[^"\\\x00-\x1f]*"', data[:5000]))
    if not places:
        return data
    place = rng.choice(places)
    changed = data[: place.start()] + rng.choice(VALUES).encode() + data[place.end() :]
    if data[8:9] == b"{":
        length = int.from_bytes(data[:8], "little") + len(changed) - len(data)
        changed[:8] = (length % (1 << 64)).to_bytes(8, "little")
    return changed


def read_everything(path: Path) -> None:
    verify(path)
    with open_checkpoint(path) as model:
        for name in model.names:
            schemes.to_float(model[name])
        if "llama" in path.name:  # a whole model: families and tools read it too
            for spec in plan(model, "float16").specs:
                spec.load()


def run(folder: Path, first: int, count: int) -> tuple[int, int]:
    """How many cases were refused, and how many went through."""
    files = originals(folder)
    kinds = list(files)
    refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(first, first + count):
        opened, file = files[kinds[seed % len(kinds)]]
        whole = file.read_bytes()
        file.write_bytes(mutate(random.Random(seed), whole))
        signal.setitimer(signal.ITIMER_PROF, 5)  # seconds of work: others on the machine do not count
        try:
            read_everything(opened)
        except OnDeviceError as error:
            refused += 1
            lines = str(error).encode("utf-8").split(b"\n")  # strict: what can't be printed would crash a terminal
            assert len(lines) == 2 and all(lines), (seed, error)
        except BaseException:
            print(f"seed {seed}, {file.name}", file=sys.stderr)
            raise
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        file.write_bytes(whole)
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        assert growth < GROWTH_LIMIT, f"seed {seed}: memory grew by {growth >> 20} MiB"
    return refused, count - refused


if __name__ == "__main__":
    np.seterr(all="ignore")
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    work = Path(sys.argv[1])
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    print(*run(work, int(sys.argv[2]), int(sys.argv[3])))
