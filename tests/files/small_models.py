"""Small model files, written by the official packages: the oracles for our readers."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

from ondevice.schemes import LAYOUT, row_bytes

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of blocks with every bit random, but finite scales."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, row_bytes(kind, columns)), dtype=np.uint8).view(LAYOUT[kind])
    for name in {"d", "m", "dmin"} & set(blocks.dtype.names):
        blocks[name] = rng.normal(size=blocks.shape).astype(np.float16)
    return blocks.view(np.uint8)


def write_gguf(path: Path, kinds: tuple[str, ...] = KINDS, tokens: int = 20) -> dict[str, np.ndarray]:
    """A GGUF with one [3, 512] matrix a kind, an F32 and an F16 tensor and every type of metadata; what it holds."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_uint64("big", 1 << 40)
    writer.add_int8("small", -3)
    writer.add_float64("pi", 3.5)
    writer.add_bool("yes", True)
    writer.add_string("words", "grüß dich 🙂")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_token_list([f"token{i}é" for i in range(tokens)])
    held = {kind.lower(): random_blocks(kind, 3, 512) for kind in kinds}
    for kind, blocks in zip(kinds, held.values(), strict=True):
        writer.add_tensor(kind.lower(), blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    held["norm"] = rng.normal(size=5).astype(np.float32)
    held["half"] = rng.normal(size=(2, 3, 4)).astype(np.float16)
    writer.add_tensor("norm", held["norm"])
    writer.add_tensor("half", held["half"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def write_hf(folder: Path, shards: int = 1) -> dict[str, np.ndarray]:
    """A Hugging Face folder with four tensors in one or two safetensors; what it holds."""
    rng = np.random.default_rng(2)
    held = {
        "a.weight": rng.normal(size=(4, 8)).astype(np.float32),
        "b.weight": rng.normal(size=(3, 5)).astype(np.float16),
        "c.bias": rng.integers(-5, 5, 7),
        "d.flags": np.array([True, False, True]),
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    if shards == 1:
        save_file(held, folder / "model.safetensors")
        return held
    places = {name: f"model-0000{1 + i % shards}.safetensors" for i, name in enumerate(held)}
    for file in set(places.values()):
        save_file({name: part for name, part in held.items() if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return held


def write_llama(path: Path, kind: str) -> None:
    """A llama of one layer whose matrices are blocks of `kind`, and whose tokenizer has four tokens."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_float32("general.sampling.temp", 0.6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", "<end>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    blocks = random_blocks(kind, 256, 256)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("token_embd.weight", blocks[:4], raw_dtype=gguf.GGMLQuantizationType[kind])
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
