"""llama.cpp through llama-cpp-python: peer_llama_cpp.py MODEL PROMPT_TOKENS GENERATE_TOKENS DEPTH THREADS"""

import json
import statistics
import sys
import time

from llama_cpp import Llama

path, prompt, generate, depth, threads = sys.argv[1], *map(int, sys.argv[2:6])
context = max(prompt, depth + generate) + 64
threading = {"n_threads": threads, "n_threads_batch": threads}
model = Llama(path, n_ctx=context, n_batch=512, n_ubatch=512, flash_attn=True, verbose=False, **threading)


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


prefill, decode = [], []
for _ in range(3):
    model.reset()
    prefill.append(prompt / seconds(lambda: model.eval([(7 * i) % 20000 + 100 for i in range(prompt)])))
    model.reset()
    model.eval([100 + i % 20000 for i in range(max(depth, 1))])
    decode.append(generate / seconds(lambda: [model.eval([100 + i]) for i in range(generate)]))
figures = {"prefill_tokens_per_second": prefill[1:], "decode_tokens_per_second": decode[1:]}  # the first is a warm-up
print(json.dumps({name: statistics.median(values) for name, values in figures.items()}))
