"""transformers in bfloat16: peer_transformers.py FOLDER PROMPT_TOKENS GENERATE_TOKENS DEPTH THREADS"""

import json
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM

path, prompt, generate, depth, threads = sys.argv[1], *map(int, sys.argv[2:6])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
ids = torch.arange(prompt)[None] * 7 % 20000 + 100
context = torch.arange(max(depth, 1))[None] % 20000 + 100
prefill, decode = [], []
with torch.inference_mode():
    for _ in range(3):
        started = time.perf_counter()
        model(ids, logits_to_keep=1)
        prefill.append(prompt / (time.perf_counter() - started))
        past = model(context, logits_to_keep=1).past_key_values
        started = time.perf_counter()
        for i in range(generate):
            past = model(torch.tensor([[100 + i]]), past_key_values=past).past_key_values
        decode.append(generate / (time.perf_counter() - started))
figures = {"prefill_tokens_per_second": prefill[1:], "decode_tokens_per_second": decode[1:]}  # the first is a warm-up
print(json.dumps({name: statistics.median(values) for name, values in figures.items()}))
