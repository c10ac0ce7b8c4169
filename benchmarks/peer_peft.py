"""LoRA on every linear map with peft, for `train.py`: FOLDER DTYPE ROWS TOKENS STEPS THREADS [checkpoint]; prints one
JSON object."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

folder, dtype, *numbers = sys.argv[1:7]
rows, tokens, steps, threads = map(int, numbers)
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
if "checkpoint" in sys.argv[7:]:
    model.gradient_checkpointing_enable({"use_reentrant": False})
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
ids = torch.randint(100, 20000, (rows, tokens), generator=torch.Generator().manual_seed(0))
seconds = []
for _ in range(steps):
    started = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - started)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"tokens_per_second": ids.numel() / statistics.median(seconds[1:]), "peak_memory_bytes": peak}))
