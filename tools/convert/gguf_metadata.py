"""A model's config as GGUF's metadata, under the names that its architecture has in llama.cpp.

What a family reads from a GGUF (`models/families/gguf.py`) is written here, the other way round; whatever has no key
there is found by reading the metadata back: a config that does not come back the same is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ...checkpoint import Checkpoint, Spec
from ...errors import OnDeviceError, Unsupported
from ...models.config import AttentionConfig, ConvolutionConfig, DeltaConfig, Mixer, MLPConfig, ModelConfig, MoEConfig
from ...models.families import Family, gguf
from ...models.ropes import RopeConfig
from ...runtime.side_files import SAMPLING
from ...tensors import Dense, Tensor

# How keys of such numbers end.
FLOATS = "epsilon", "freq_base", "freq_base_swa", "factor", "softcapping", "scale", "attn_factor"
SCALINGS = ("linear", "yarn", "longrope")
QUANTIZATION_VERSION = 2
WINDOWED = frozenset({"gemma2", "gemma3", "cohere2", "olmo2", "gpt-oss"})  # those whose windows llama.cpp heeds
UNREADABLE = "all: its metadata could not be read"
FILE_TYPES = {  # llama.cpp's general.file_type, by the type of most of the weights
    "float32": 0, "float16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12,
    "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "bfloat16": 32, "MXFP4": 38,
}  # fmt: skip
SIGMOID = 2  # llama.cpp's number of that gate


def architecture_keys(family: Family, config: ModelConfig, hf: Mapping) -> dict[str, Any]:
    """The keys behind the architecture's name, with it. hf: the config.json."""
    mixers = [layer.mixer for layer in config.layers]
    attention = next((mixer for mixer in mixers if isinstance(mixer, AttentionConfig)), None)
    if attention is None:
        raise Unsupported(
            f"GGUF's form of {family.name} is not written here: none of its layers is plain attention.",
            "Keep it as a folder: --to hf or --to mlx.",
        )
    everywhere = not any(isinstance(mixer, ConvolutionConfig) for mixer in mixers)
    kv_heads = [mixer.kv_heads if isinstance(mixer, AttentionConfig) else 0 for mixer in mixers]
    keys = {**gguf.KEYS, **family.gguf.keys}
    known = dict(family.gguf.usual(config))
    known |= {key: hf[name] for name, key in keys.items() if hf.get(name) is not None and name != "head_dim"}
    known |= {
        "context_length": config.context,
        "embedding_length": config.width,
        "block_count": len(config.layers),
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads if everywhere else kv_heads,
        f"attention.layer_norm_{'rms_' if config.norm == 'rms' else ''}epsilon": config.norm_eps,
        "vocab_size": config.vocab,
    }
    routed = _feed_forward_keys([layer.feed_forward for layer in config.layers])
    if "expert_count" not in routed:  # some files without experts say how many a token would go to
        known = {key: value for key, value in known.items() if not key.startswith("expert_")}
    known |= routed
    known |= {"attention.key_length": attention.head_dim, "attention.value_length": attention.head_dim}
    known |= _rope_keys(config) | _delta_keys(mixers)
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
            if layer.shared:
                keys["expert_shared_feed_forward_length"] = layer.shared.hidden
                keys["expert_shared_count"] = max(1, layer.shared.hidden // layer.hidden)
            if layer.rule.scoring == "sigmoid":
                keys |= {"expert_gating_func": SIGMOID, "expert_weights_norm": layer.rule.renormalise}
                keys["expert_weights_scale"] = layer.rule.scale
    dense = [isinstance(layer, MLPConfig) for layer in layers]
    if not all(dense):
        keys["leading_dense_block_count"] = dense.index(False)
    return keys


def _delta_keys(mixers: Sequence[Mixer]) -> dict[str, Any]:
    """Of layers that keep a memory."""
    remembers = [isinstance(mixer, DeltaConfig) for mixer in mixers]
    if not any(remembers):
        return {}
    delta = mixers[remembers.index(True)]
    if delta.key_dim != delta.value_dim:
        raise Unsupported(
            f"llama.cpp has one size for a memory's keys and values, which here are {delta.key_dim} and "
            f"{delta.value_dim}.",
            "Keep it as a folder: --to hf or --to mlx.",
        )
    return {
        "ssm.conv_kernel": delta.taps,
        "ssm.state_size": delta.key_dim,
        "ssm.group_count": delta.key_heads,
        "ssm.time_step_rank": delta.heads,
        "ssm.inner_size": delta.values,
        "full_attention_interval": remembers.index(False) + 1,
        "attention.recurrent_layers": remembers,
    }


def _typed(key: str, value: Any) -> Any:
    """llama.cpp insists on the kind of number: 100000 as a base of frequencies is 100000.0."""
    return float(value) if key.endswith(FLOATS) and not isinstance(value, str | list) else value


def _rope_keys(config: ModelConfig) -> dict[str, Any]:
    main, local = config.ropes.get("main"), config.ropes.get("local")
    if main is None:
        return {}
    keys: dict[str, Any] = {"rope.dimension_count": main.dim, "rope.freq_base": main.base}
    if local:
        keys["rope.freq_base_swa"] = local.base
    kind = main.scaling.get("rope_type", main.scaling.get("type", "default"))
    if kind not in ("default", "llama3"):  # Llama 3's rule is a tensor, rope_freqs.weight
        if kind not in SCALINGS:
            raise Unsupported(
                f"The model scales its positions by the rule {kind!r:.40}, which llama.cpp does not know.",
                "Keep it as a folder: --to hf or --to mlx.",
            )
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": main.scaling.get("factor")}
        keys["rope.scaling.original_context_length"] = main.scaling.get("original_max_position_embeddings")
    if kind == "longrope":
        keys["rope.scaling.attn_factor"] = main.frequencies(config.context)[1]
    return keys


def rope_divisors(config: ModelConfig) -> np.ndarray | None:
    """Llama 3's scaling as llama.cpp stores it: by how much each frequency is divided; None for other models."""
    main = config.ropes.get("main")
    if main is None or main.scaling.get("rope_type", main.scaling.get("type")) != "llama3":
        return None
    plain = type(main)(main.dim, main.base)
    return plain.frequencies()[0] / main.frequencies()[0]


def rope_factors(config: ModelConfig) -> list[np.ndarray | None]:
    """Longrope's factors for long texts and for short ones, as llama.cpp stores them; None for other models."""
    rule = config.ropes["main"].scaling if "main" in config.ropes else {}
    lists = [rule.get(f"{which}_factor") for which in ("long", "short")]
    return [None if found is None else np.array(found) for found in lists]


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


def faults(
    family: Family, config: ModelConfig, metadata: Mapping[str, Any], specs: Sequence[Spec], path: Path
) -> list[str]:
    """What this metadata, read as a GGUF's, would make other than `config` is, and the tensors that the architecture
    does not have; [] where the model comes back the same; UNREADABLE and why, where it does not come back at all."""
    preview = _Preview(path, {spec.name: spec for spec in specs})
    try:
        back = family.config(family.gguf.config(metadata, preview))
    except OnDeviceError as error:
        return [UNREADABLE, error.message.rstrip(".")]
    if family.gguf.architecture not in WINDOWED:  # llama.cpp lets it see everything, whatever stands in the file
        config, back = without_windows(config), without_windows(back)
    found = [*differences(config, back, config.context), *_strange(family.gguf.architecture, preview.specs)]
    return list(dict.fromkeys(re.sub(r"^layers\[\d+\]\.|^blk\.\d+\.", "", fault) for fault in found))


def without_windows(config: ModelConfig) -> ModelConfig:
    """The same model, in which every layer of attention sees the whole text."""
    layers = tuple(
        replace(layer, mixer=replace(layer.mixer, spec=replace(layer.mixer.spec, window=None)))
        if isinstance(layer.mixer, AttentionConfig)
        else layer
        for layer in config.layers
    )
    return replace(config, layers=layers)


def notes(family: Family, config: ModelConfig) -> tuple[str, ...]:
    """What llama.cpp will do otherwise, though the file says all."""
    mixers = [layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionConfig)]
    windows = {mixer.spec.window for mixer in mixers} - {None}
    differs = (f"llama.cpp {family.gguf.differs}.",) if family.gguf.differs else ()
    if not windows or min(windows) >= config.context or family.gguf.architecture in WINDOWED:
        return differs
    return (
        *differs,
        f"llama.cpp pays no heed to the sliding window of {min(windows)} tokens in the architecture "
        f"{family.gguf.architecture}: behind longer texts it computes something else.",
    )


def _strange(architecture: str, names: Iterable[str]) -> list[str]:
    """Tensors that llama.cpp does not expect of an architecture."""
    from gguf import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

    kinds = next((MODEL_TENSORS[arch] for arch, name in MODEL_ARCH_NAMES.items() if name == architecture), ())
    known = {TENSOR_NAMES[kind].replace("{bid}", "0") for kind in kinds} | {"rope_freqs"}
    modules = (name.removesuffix(".weight").removesuffix(".bias") for name in names)
    return [module for module in modules if re.sub(r"\d+", "0", module, count=1) not in known]


class _Preview(SimpleNamespace):
    """The checkpoint that the planned tensors will be, as far as a config is read from it."""

    def __init__(self, path: Path, specs: Mapping[str, Spec]):
        super().__init__(path=path, specs=specs)

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def __getitem__(self, name: str) -> Tensor:
        spec = self.specs[name]
        return spec.load() if len(spec.shape) == 1 else Tensor(spec.shape, spec.format, {})


def differences(one: Any, other: Any, length: int, where: str = "") -> Iterator[str]:
    """The fields in which two configs differ, with the first one's value, but for the float32 that GGUF keeps of a
    number; ropes by the frequencies that they make of `length` tokens."""
    if isinstance(one, RopeConfig) and isinstance(other, RopeConfig):
        if not all(_same_frequencies(one.frequencies(n), other.frequencies(n)) for n in (None, length)):
            yield f"{where} = {dict(one.scaling)}"
        if one.interleaved != other.interleaved:
            yield f"{where}.interleaved = {one.interleaved}"
    elif is_dataclass(one) and type(one) is type(other):
        for name in (f.name for f in fields(one)):
            yield from differences(getattr(one, name), getattr(other, name), length, f"{where}.{name}".lstrip("."))
    elif isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, length, f"{where}[{i}]")
    elif isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        for key in one:
            yield from differences(one[key], other[key], length, f"{where}.{key}")
    elif not _equal(one, other):
        yield f"{where} = {one!r:.80}"


def _equal(one: Any, other: Any) -> bool:
    numbers = isinstance(one, float) and isinstance(other, int | float)
    return bool(np.isclose(one, other, rtol=1e-6, atol=0)) if numbers else one == other


def _same_frequencies(one: tuple[np.ndarray, float], other: tuple[np.ndarray, float]) -> bool:
    return one[0].shape == other[0].shape and np.allclose(one[0], other[0], rtol=1e-4) and _equal(one[1], other[1])
