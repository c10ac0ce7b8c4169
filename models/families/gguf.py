"""What llama.cpp's architectures share: tensor names, metadata keys, the order of rotary pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ...errors import BadFile, Unsupported
from ...schemes import take_columns, take_rows, to_float
from ...tensors import Tensor, dense
from ..config import DeltaConfig, ModelConfig
from ..fields import head_dim, whole
from ..ropes import RopeConfig, rope
from . import NameMap
from .views import by_key_head

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint

NAMES = NameMap(
    {
        "embed": "token_embd.weight",
        "norm": "output_norm.weight",
        "head": "output.weight",
        "layers.{i}.attn_norm": "blk.{i}.attn_norm.weight",
        "layers.{i}.mlp_norm": "blk.{i}.ffn_norm.weight",
        "layers.{i}.attn.q": "blk.{i}.attn_q.weight",
        "layers.{i}.attn.k": "blk.{i}.attn_k.weight",
        "layers.{i}.attn.v": "blk.{i}.attn_v.weight",
        "layers.{i}.attn.qkv": "blk.{i}.attn_qkv.weight",
        "layers.{i}.attn.o": "blk.{i}.attn_output.weight",
        "layers.{i}.attn.q_norm": "blk.{i}.attn_q_norm.weight",
        "layers.{i}.attn.k_norm": "blk.{i}.attn_k_norm.weight",
        "positions": "position_embd.weight",
        "layers.{i}.mlp.gate": "blk.{i}.ffn_gate.weight",
        "layers.{i}.mlp.up": "blk.{i}.ffn_up.weight",
        "layers.{i}.mlp.down": "blk.{i}.ffn_down.weight",
        "layers.{i}.moe.router": "blk.{i}.ffn_gate_inp.weight",
        "layers.{i}.moe.election": "blk.{i}.exp_probs_b.bias",
        "layers.{i}.moe.gate": ("blk.{i}.ffn_gate_exps.weight", "blk.{i}.ffn_gate_up_exps.weight|first"),
        "layers.{i}.moe.up": ("blk.{i}.ffn_up_exps.weight", "blk.{i}.ffn_gate_up_exps.weight|last"),
        "layers.{i}.moe.down": "blk.{i}.ffn_down_exps.weight",
        "layers.{i}.moe.shared_gate": "blk.{i}.ffn_gate_inp_shexp.weight|row",
        "layers.{i}.moe.shared.gate": "blk.{i}.ffn_gate_shexp.weight",
        "layers.{i}.moe.shared.up": "blk.{i}.ffn_up_shexp.weight",
        "layers.{i}.moe.shared.down": "blk.{i}.ffn_down_shexp.weight",
    }
)
SANDWICH = NAMES | {
    "layers.{i}.attn_post_norm": "blk.{i}.post_attention_norm.weight",
    "layers.{i}.mlp_post_norm": "blk.{i}.post_ffw_norm.weight",
}

KEYS = {  # Hugging Face's name -> (key behind the architecture's name)
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
BIASES = {  # no metadata says so
    "attention_bias": ("blk.0.attn_q.bias", "blk.0.attn_qkv.bias"),
    "mlp_bias": ("blk.0.ffn_up.bias",),
}


def config(
    metadata: Mapping,
    checkpoint: Checkpoint,
    model_type: str,
    architecture_class: str,
    keys: Mapping[str, str] | None = None,
    **more,
) -> dict:
    """The metadata as a config.json of this model type. keys: the family's own, as in KEYS; more: what the family adds
    or overrides."""
    prefix = metadata["general.architecture"]
    found = {hf: metadata.get(f"{prefix}.{key}") for hf, key in {**KEYS, **(keys or {})}.items()}
    hf = {key: value for key, value in found.items() if value is not None}
    if "token_embd.weight" not in checkpoint:
        raise BadFile(
            f"{checkpoint.path} has no token_embd.weight.", "It may be one part of a split GGUF; fetch the whole."
        )
    hf["num_hidden_layers"] = whole(hf, "num_hidden_layers") - guessing(metadata)
    hf["vocab_size"] = next(iter(checkpoint["token_embd.weight"].shape), None)
    hf["tie_word_embeddings"] = "output.weight" not in checkpoint
    hf |= {key: any(name in checkpoint for name in names) for key, names in BIASES.items()}
    hf |= _rope_scaling(metadata, prefix, checkpoint, hf)
    for ours in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{ours}_token_id")
        if isinstance(token, int):
            hf[f"{ours}_token_id"] = token
    return {"architectures": [architecture_class], "model_type": model_type} | hf | more


def guessing(metadata: Mapping) -> int:
    """How many of a file's layers, its last ones, guess tokens further ahead."""
    prefix = metadata.get("general.architecture")
    return whole({"n": metadata.get(f"{prefix}.nextn_predict_layers")}, "n", 0, least=0)


def rope_factors(metadata: Mapping, checkpoint: Checkpoint, hf: Mapping) -> dict:
    """A config.json's fields of longrope, whose factors are tensors."""
    factors = {f"{kind}_factor": f"rope_factors_{kind}.weight" for kind in ("short", "long")}
    prefix = metadata.get("general.architecture")
    old = metadata.get(f"{prefix}.rope.scaling.original_context_length", hf.get("max_position_embeddings"))
    if any(name not in checkpoint for name in factors.values()):
        return {"original_max_position_embeddings": old}
    lists = {key: to_float(checkpoint[name]).tolist() for key, name in factors.items()}
    return {"original_max_position_embeddings": old, "rope_scaling": {"rope_type": "longrope", **lists}}


def _rope_scaling(metadata: Mapping, prefix: str, checkpoint: Checkpoint, hf: Mapping) -> dict:
    size = head_dim(hf)
    turning = whole({"dimension_count": metadata.get(f"{prefix}.rope.dimension_count")}, "dimension_count", size)
    found = {"partial_rotary_factor": turning / size}
    kind = metadata.get(f"{prefix}.rope.scaling.type", "none")
    if kind != "none":
        keys = {
            "factor": "factor", "original_max_position_embeddings": "original_context_length",
            "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow",
        }  # fmt: skip
        values = {ours: metadata.get(f"{prefix}.rope.scaling.{key}") for ours, key in keys.items()}
        return found | {"rope_scaling": {"rope_type": kind, **{k: v for k, v in values.items() if v is not None}}}
    return found | (_llama3(checkpoint, rope(hf | found, size)) if "rope_freqs.weight" in checkpoint else {})


def _llama3(checkpoint: Checkpoint, plain: RopeConfig) -> dict:
    """`rope_freqs.weight`, by which llama.cpp divides the frequencies, as the rule that it was computed from: the
    largest divisor is the factor, and the rest is the same in every Llama 3. Raises Unsupported for any other."""
    divisors = to_float(checkpoint["rope_freqs.weight"])
    rule = {
        "rope_type": "llama3",
        "factor": float(divisors.max(initial=1.0)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    known, base = replace(plain, scaling=rule).frequencies()[0], plain.frequencies()[0]
    if divisors.shape != base.shape or not np.allclose(base / divisors, known, rtol=1e-4):
        raise Unsupported(
            f"{checkpoint.path} scales its rotary frequencies (rope_freqs.weight) unlike Llama 3.",
            "Take the model as a Hugging Face folder.",
        )
    return {"rope_scaling": rule}


def unpermute(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Llama's q and k: llama.cpp interleaves the two halves of each head's rows; this puts them apart again."""
    kind = name.split(".")[-1] if not name.endswith(".bias") else name.split(".")[-2]
    if ".attn." not in name or kind not in ("q", "k"):
        return tensor
    d = config.layers[0].mixer.head_dim
    rows = np.arange(tensor.shape[0]).reshape(-1, d // 2, 2).swapaxes(1, 2).ravel()
    return take_rows(tensor, rows)


def minus_one(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Gemma's norms: llama.cpp stores gain + 1."""
    if not name.endswith("norm"):
        return tensor
    return dense(to_float(tensor) - np.float32(1))


Order = Callable[[str, int, DeltaConfig], np.ndarray]
Change = Callable[[np.ndarray], np.ndarray]


def memory(order: Order) -> tuple[Callable, Callable]:
    """How tensors of a model whose layers keep a memory are brought back, and how that is undone: rows and columns by
    `order` (which rows of a file, in Hugging Face's order: of a part, with so many rows, of such a layer), gains (one
    more in a file, but for the memory's own), rates (minus their exponential)."""

    def moved(name: str, tensor: Tensor, config: ModelConfig, way: Change) -> Tensor:
        _, inside, kind = name.rpartition(".delta.")
        if not inside or kind == "norm":
            return tensor
        take, count = (take_columns, tensor.shape[-1]) if kind == "out" else (take_rows, tensor.shape[0])
        return take(tensor, way(order(kind, count, config.layers[int(name.split(".")[1])].mixer)))

    def turned(way: Change, rates: Change, step: int) -> Callable:
        def turn(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
            tensor = moved(name, tensor, config, way)
            if name.endswith("delta.rate"):
                return dense(rates(to_float(tensor)))
            gains = name.endswith("norm") and not name.endswith("delta.norm")
            return dense(to_float(tensor) + np.float32(step)) if gains else tensor

        return turn

    return turned(lambda rows: rows, lambda x: np.log(-x), -1), turned(np.argsort, lambda x: -np.exp(x), 1)


def in_turn(kind: str, count: int, mixer: DeltaConfig) -> np.ndarray:
    """Files have the value heads in turn, one of each key head; Hugging Face has those of a key head together."""
    before = 2 * mixer.keys if kind in ("qkv", "taps") else 0
    values = np.arange(before, count).reshape(-1, mixer.key_heads, (count - before) // mixer.heads)
    return np.concatenate([np.arange(before), values.swapaxes(0, 1).ravel()])


def by_key(kind: str, count: int, mixer: DeltaConfig) -> np.ndarray:
    """The convolution's channels, ours by key head where q, k and v lie so."""
    return by_key_head(mixer) if kind == "taps" else np.arange(count)


def has_experts(metadata: Mapping) -> bool:
    """Whether the file is a mixture of experts: some architectures stand for both."""
    return bool(metadata.get(f"{metadata.get('general.architecture')}.expert_count"))


def by_head(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """GPT-NeoX's q, k and v: llama.cpp puts all heads' queries first; Hugging Face's file has them head by head."""
    if "attn.qkv" not in name:
        return tensor
    a = config.layers[0].mixer
    rows = np.arange(tensor.shape[0]).reshape(3, a.heads, a.head_dim).swapaxes(0, 1).ravel()
    return take_rows(tensor, rows)
