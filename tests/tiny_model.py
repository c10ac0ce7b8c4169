"""A model folder of a few kilobytes, complete: random weights, a tokenizer of printable ASCII, ChatML's template."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 32, 48, 2, 4, 2
MERGES = [("t", "h"), ("th", "e"), ("a", "n"), ("an", "d"), ("Ġ", "the"), ("i", "n"), ("o", "n")]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer() -> Tokenizer:
    """Byte-level BPE whose alphabet is printable ASCII, so that whatever a random model says is text."""
    letters = ["Ċ", "Ġ", *map(chr, range(33, 127))]
    vocabulary = {piece: id for id, piece in enumerate([*letters, *("".join(pair) for pair in MERGES)])}
    made = Tokenizer(models.BPE(vocabulary, MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


def write_tiny_model(folder: Path, template: str | None = CHATML, context: int = 4096, **generation: object) -> Path:
    """generation: what stands in generation_config.json."""
    folder.mkdir(parents=True)
    cut = tokenizer()
    cut.save(str(folder / "tokenizer.json"))
    described = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(described | ({"chat_template": template} if template else {}))
    )
    (folder / "generation_config.json").write_text(json.dumps(generation))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH, "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "vocab_size": cut.get_vocab_size(), "max_position_embeddings": context, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(cut.get_vocab_size()), folder / "model.safetensors")
    return folder


def _weights(vocab: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(7)
    head = WIDTH // HEADS
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KV_HEADS * head, WIDTH),
        "self_attn.v_proj": (KV_HEADS * head, WIDTH), "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH), "mlp.down_proj": (WIDTH, HIDDEN),
    }  # fmt: skip
    made = {"model.embed_tokens.weight": (vocab, WIDTH), "lm_head.weight": (vocab, WIDTH)}
    made |= {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()}
    weights = {name: draw.normal(size=shape).astype(np.float32) * 0.3 for name, shape in made.items()}
    norms = [f"model.layers.{i}.{n}_layernorm.weight" for i in range(LAYERS) for n in ("input", "post_attention")]
    return weights | {name: np.ones(WIDTH, np.float32) for name in [*norms, "model.norm.weight"]}
