"""A model's config as GGUF's metadata, under the names that its architecture has in llama.cpp.

What a family reads from a GGUF (`models/families/gguf.py`) is written here, the other way round; whatever has no key
there is found by reading the metadata back: a config that does not come back the same is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ...checkpoint import Checkpoint, Spec
from ...errors import OnDeviceError, Unsupported
from ...models.config import MLPConfig, ModelConfig, MoEConfig
from ...models.families import Family, gguf
from ...tensors import Dense, Tensor
from .side_files import SAMPLING

FLOATS = "epsilon", "freq_base", "freq_base_swa", "factor", "softcapping", "scale"  # how keys of such numbers end
QUANTIZATION_VERSION = 2
FILE_TYPES = {  # llama.cpp's general.file_type, by the type of most of the weights
    "float32": 0, "float16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12,
    "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "bfloat16": 32,
}  # fmt: skip
KEPT = ("general.", "tokenizer.")  # keys that another GGUF's metadata hand on


def architecture_keys(family: Family, config: ModelConfig, hf: Mapping) -> dict[str, Any]:
    """The keys behind the architecture's name, with it. hf: the config.json."""
    attention = config.layers[0].mixer
    known = {key: hf.get(name) for name, key in gguf.KEYS.items() if name != "head_dim"}
    known |= {
        "context_length": config.context,
        "embedding_length": config.width,
        "block_count": len(config.layers),
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "vocab_size": config.vocab,
    }
    known |= _feed_forward_keys([layer.feed_forward for layer in config.layers])
    if attention.heads * attention.head_dim != config.width:
        known |= {"attention.key_length": attention.head_dim, "attention.value_length": attention.head_dim}
    known |= _rope_keys(config)
    prefix = family.gguf.architecture
    return {f"{prefix}.{key}": _typed(key, value) for key, value in known.items() if value is not None}


def _feed_forward_keys(layers: Sequence[MLPConfig | MoEConfig]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for layer in layers:
        if isinstance(layer, MLPConfig):
            keys["feed_forward_length"] = layer.hidden
        else:
            keys |= {"expert_count": layer.experts, "expert_used_count": layer.per_token}
            keys["expert_feed_forward_length"] = layer.hidden
    return keys


def _typed(key: str, value: Any) -> Any:
    """llama.cpp insists on the kind of number: 100000 as a base of frequencies is 100000.0."""
    return float(value) if key.endswith(FLOATS) and not isinstance(value, str | list) else value


def _rope_keys(config: ModelConfig) -> dict[str, Any]:
    main, local = config.ropes["main"], config.ropes.get("local")
    keys: dict[str, Any] = {"rope.dimension_count": main.dim, "rope.freq_base": main.base}
    if local:
        keys["rope.freq_base_swa"] = local.base
    kind = main.scaling.get("rope_type", main.scaling.get("type", "default"))
    if kind not in ("default", "llama3"):  # Llama 3's rule is a tensor, rope_freqs.weight
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": main.scaling.get("factor")}
    return keys


def rope_divisors(config: ModelConfig) -> np.ndarray | None:
    """Llama 3's scaling as llama.cpp stores it: by how much each frequency is divided; None for other models."""
    main = config.ropes["main"]
    if main.scaling.get("rope_type", main.scaling.get("type")) != "llama3":
        return None
    plain = type(main)(main.dim, main.base)
    return plain.frequencies()[0] / main.frequencies()[0]


def general_keys(checkpoint: Checkpoint, specs: Sequence[Spec]) -> dict[str, Any]:
    """What the file is. Another GGUF's name, licence and so on are handed on."""
    metadata = checkpoint.metadata
    keys = {key: metadata[key] for key in metadata if key.startswith("general.")}
    keys = {"general.type": "model", "general.name": checkpoint.path.absolute().stem} | keys
    sizes: dict[str, int] = {}
    for spec in specs:
        name = spec.format.dtype if isinstance(spec.format, Dense) else spec.format.kind
        sizes[name] = sizes.get(name, 0) + int(np.prod(spec.shape))
    keys["general.file_type"] = FILE_TYPES[max(sizes, key=sizes.__getitem__)]
    return keys | {"general.quantization_version": QUANTIZATION_VERSION}


def sampling_keys(generation: Mapping[str, Any]) -> dict[str, Any]:
    """A generation_config.json's sampling, where it asks for any."""
    if generation.get("do_sample") is not True:
        return {}
    found = {key: generation.get(name) for key, name in SAMPLING.items()}
    numbers = {key: value for key, value in found.items() if type(value) in (int, float)}
    return {f"general.sampling.{key}": int(v) if key == "top_k" else float(v) for key, v in numbers.items()}


# ------------------------------------------------------------------------------------------------ reading it back


def check_back(
    family: Family, config: ModelConfig, metadata: Mapping[str, Any], specs: Sequence[Spec], path: Path
) -> None:
    """Raises Unsupported where this metadata, read as a GGUF's, would be another model than `config`."""
    preview = _Preview(path, {spec.name: spec for spec in specs})
    try:
        back = family.config(family.gguf.config(metadata, preview))
    except OnDeviceError as error:
        raise _no_place(path, family, error.message) from None
    wrong = [
        f"{field.name} = {_short(getattr(config, field.name))}"
        for field in fields(config)
        if not _same(getattr(config, field.name), getattr(back, field.name))
    ]
    if wrong:
        raise _no_place(path, family, f"{', '.join(wrong)} would not come back")


def _no_place(path: Path, family: Family, why: str) -> Unsupported:
    return Unsupported(
        f"{path} has settings that a GGUF of the architecture {family.gguf.architecture!r} has no place for: "
        f"{why.rstrip('.')}.",
        "Keep it as a folder: --to hf or --to mlx.",
    )


class _Preview(SimpleNamespace):
    """The checkpoint that the planned tensors will be, as far as a config is read from it."""

    def __init__(self, path: Path, specs: Mapping[str, Spec]):
        super().__init__(path=path, specs=specs)

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def __getitem__(self, name: str) -> Tensor:
        spec = self.specs[name]
        return spec.load() if len(spec.shape) == 1 else Tensor(spec.shape, spec.format, {})


def _same(one: Any, other: Any) -> bool:
    """Equal, but for the float32 that GGUF keeps of a number; a rope by the frequencies that it makes."""
    if hasattr(one, "frequencies") and hasattr(other, "frequencies"):
        (a, scale), (b, other_scale) = one.frequencies(), other.frequencies()
        return a.shape == b.shape and np.allclose(a, b, rtol=1e-4) and scale == other_scale
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.isclose(one, other, rtol=1e-6, atol=0))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if is_dataclass(one) and type(one) is type(other):
        return all(_same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return one == other


def _short(value: Any) -> str:
    text = repr(value[0] if isinstance(value, tuple) and value else value)
    return text if len(text) < 120 else text[:117] + "…"
