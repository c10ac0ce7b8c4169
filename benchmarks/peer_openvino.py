"""OpenVINO GenAI: peer_openvino.py MODEL PROMPT_TOKENS GENERATE_TOKENS DEPTH THREADS

It takes text, so prompts are words, of which its tokenizer makes about as many tokens; speeds are by the tokens that it
counts itself. Every prompt differs: none is found in its cache of prefixes.
"""

import json
import random
import statistics
import sys

import openvino_genai as ov

WORDS = "time year people way day man thing woman life child world school state family student group country".split()
path, prompt, generate, depth, threads = sys.argv[1], *map(int, sys.argv[2:6])
pipeline = ov.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads)


def run(words: int, tokens: int, seed: int):
    """Its own measurements of one answer."""
    text = " ".join(random.Random(seed).choices(WORDS, k=max(words, 1)))
    return pipeline.generate([text], max_new_tokens=tokens, do_sample=False, ignore_eos=True).perf_metrics


prefill, decode = [], []
for seed in range(3):
    metrics = run(prompt, 2, seed)
    prefill.append(metrics.get_num_input_tokens() / metrics.get_ttft().mean * 1e3)
    decode.append(1e3 / run(depth, generate, seed + 100).get_tpot().mean)
figures = {"prefill_tokens_per_second": prefill[1:], "decode_tokens_per_second": decode[1:]}  # the first is a warm-up
print(json.dumps({name: statistics.median(values) for name, values in figures.items()}))
