"""llama.cpp through llama-cpp-python: peer_llama_cpp.py MODEL PROMPT GENERATE DEPTH[,DEPTH…] THREADS [plain].

`plain` is without flash attention."""

import json
import statistics
import sys
import time

from llama_cpp import Llama

path, prompt, generate, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[5])
depths = [int(depth) for depth in sys.argv[4].split(",")]
context = max(prompt, max(depths) + generate) + 64
threading = {"n_threads": threads, "n_threads_batch": threads}
flash = sys.argv[6:] != ["plain"]
model = Llama(path, n_ctx=context, n_batch=512, n_ubatch=512, flash_attn=flash, verbose=False, **threading)


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


prefill, decode = [], {depth: [] for depth in depths}
for _ in range(3):
    model.reset()
    prefill.append(prompt / seconds(lambda: model.eval([(7 * i) % 20000 + 100 for i in range(prompt)])))
    for depth, found in decode.items():
        model.reset()
        model.eval([100 + i % 20000 for i in range(max(depth, 1))])
        found.append(generate / seconds(lambda: [model.eval([100 + i]) for i in range(generate)]))
speeds = [{"depth": depth, "tokens_per_second": statistics.median(found[1:])} for depth, found in decode.items()]
figures = {"prefill_tokens_per_second": statistics.median(prefill[1:]), "decode": speeds}  # the first is a warm-up
print(json.dumps(figures | {"decode_tokens_per_second": speeds[0]["tokens_per_second"]}))
