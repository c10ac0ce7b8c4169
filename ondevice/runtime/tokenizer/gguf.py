"""The tokenizer inside a GGUF: byte-level BPE with llama.cpp's named pre-tokenizers, or sentencepiece's BPE."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from ...errors import BadFile, Unsupported
from . import Facts, Tokenizer
from .engines import FastCutter, PieceCutter

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # ggml's token types (1 normal, 5 unused, 6 byte)
REFETCH = "Fetch the model again."
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<EOT>",
    "<|return|>",
)

# How each named pre-tokenizer cuts text before BPE; the patterns are those of the models' own tokenizer.json files.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = (
    r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+{0}|" + r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*{0}|"
)
_SLASH_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _WORDS.replace("{0}", "") + r"\p{N}" + _SLASH_TAIL
_GPT4O = _WORDS.replace("{0}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"\p{N}{1,3}" + _SLASH_TAIL
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_DIGITS = (r"\p{N}", _GPT2)
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "roberta-bpe", "gigachat"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (_LLAMA3,)
    ),
    **dict.fromkeys(("pixtral", "lfm2", "midm-2.0"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"), (_QWEN2,)),
    "qwen35": (_QWEN35,),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    "deepseek-coder": _DEEPSEEK_CODER,
    "falcon": _FALCON,
}
WHOLE_WORDS_FIRST = {"llama3", "llama-v3", "llama-bpe", "falcon3", "tekken", "pixtral", "lfm2", "midm-2.0"}
ADDS_BOS = {"llama3", "llama-v3", "llama-bpe", "tekken", "pixtral"}


def from_gguf(metadata: Mapping) -> Tokenizer:
    """Raises BadFile for missing or damaged parts, Unsupported for kinds that are not known here."""
    model = metadata.get("tokenizer.ggml.model")
    if model == "gpt2":
        return _byte_level(metadata)
    if model == "llama":
        return _pieces(metadata)
    if model in (None, "none", "no_vocab"):
        raise BadFile("The GGUF has no tokenizer inside.", "Use a GGUF that was converted with its tokenizer.")
    raise Unsupported(f"The GGUF's tokenizer is of kind {model!r}, which is not known here.", "Known: gpt2, llama.")


def _byte_level(metadata: Mapping) -> Tokenizer:
    tokens, types = _vocabulary(metadata)
    kind = str(metadata.get("tokenizer.ggml.pre", ""))
    if kind not in PRE_TOKENIZERS:
        raise Unsupported(
            f"The GGUF's pre-tokenizer is {kind or 'not named'!r}, which is not known here.",
            f"Known: {', '.join(sorted(PRE_TOKENIZERS))}.",
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _strings(metadata, "tokenizer.ggml.merges")]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    try:
        bpe = models.BPE(vocabulary, merges, ignore_merges=kind in WHOLE_WORDS_FIRST)
    except Exception as error:  # the library raises bare Exceptions
        raise BadFile(f"The GGUF's merges do not fit its tokens: {error}.", REFETCH) from None
    fast = tokenizers.Tokenizer(bpe)
    cuts = [pre_tokenizers.Split(Regex(p), "isolated") for p in PRE_TOKENIZERS[kind]]
    fast.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    added = [i for i, t in enumerate(types) if t in (CONTROL, USER_DEFINED)]
    fast.add_tokens([AddedToken(tokens[i], special=types[i] == CONTROL, normalized=False) for i in added])
    facts = _facts(metadata, tokens, types)
    _add_around(fast, metadata, tokens, facts, bos=kind in ADDS_BOS)
    return Tokenizer(FastCutter(fast), facts, {"tokenizer.json": fast.to_str().encode(), **_config_files(facts)})


def _add_around(fast, metadata: Mapping, tokens: list[str], facts: Facts, bos: bool) -> None:
    """BOS and EOS around every text, where the file says so."""
    before = [facts.bos_id] if _flag(metadata, "add_bos_token", bos) and facts.bos_id is not None else []
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    after = [int(eos)] if _flag(metadata, "add_eos_token", False) and eos is not None else []
    if before or after:
        named = [(tokens[i], i) for i in before + after]
        single = [*(tokens[i] for i in before), "$A", *(tokens[i] for i in after)]
        fast.post_processor = processors.TemplateProcessing(single=" ".join(single), special_tokens=named)


def _pieces(metadata: Mapping) -> Tokenizer:
    tokens, types = _vocabulary(metadata)
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise BadFile("The GGUF's token scores do not fit its tokens.", REFETCH)
    facts = _facts(metadata, tokens, types)
    adds_space = _flag(metadata, "add_space_prefix", True)
    proto = sentencepiece_model(tokens, scores, types, metadata, adds_space)
    added = {tokens[i]: i for i, t in enumerate(types) if t in (UNKNOWN, CONTROL, USER_DEFINED)}
    before = (facts.bos_id,) if _flag(metadata, "add_bos_token", True) and facts.bos_id is not None else ()
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    after = (int(eos),) if _flag(metadata, "add_eos_token", False) and eos is not None else ()
    cutter = PieceCutter(proto, added, facts.special_ids, before, after, adds_space)
    extra = {"add_bos_token": bool(before), "add_eos_token": bool(after), "tokenizer_class": "LlamaTokenizer"}
    return Tokenizer(cutter, facts, {"tokenizer.model": proto, **_config_files(facts, **extra)})


def _vocabulary(metadata: Mapping) -> tuple[list[str], list[int]]:
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    types = [1] * len(tokens) if types is None else list(types)
    if len(types) != len(tokens):
        raise BadFile(f"The GGUF has {len(tokens)} tokens but {len(types)} token types.", REFETCH)
    return tokens, types


def _strings(metadata: Mapping, key: str) -> list[str]:
    found = metadata.get(key)
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        raise BadFile(f"The GGUF has no {key}.", REFETCH)
    return found


def _flag(metadata: Mapping, key: str, default: bool) -> bool:
    return bool(metadata.get(f"tokenizer.ggml.{key}", default))


def _facts(metadata: Mapping, tokens: list[str], types: list[int]) -> Facts:
    def id_of(name: str) -> int | None:
        id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if id is not None and not 0 <= int(id) < len(tokens):
            raise BadFile(f"The GGUF's {name} token {int(id)} is outside its {len(tokens)} tokens.", REFETCH)
        return None if id is None else int(id)

    bos, eos = id_of("bos"), id_of("eos")
    ends = {eos, id_of("eot"), id_of("eom")} - {None}
    special = frozenset(i for i, t in enumerate(types) if t == CONTROL) | ends
    ends |= {i for i in special if tokens[i] in TURN_ENDS}
    return Facts(
        bos, frozenset(ends), special | ({bos} - {None}), metadata.get("tokenizer.chat_template"),
        "" if bos is None else tokens[bos], "" if eos is None else tokens[eos],
    )  # fmt: skip


def _config_files(facts: Facts, **extra) -> dict[str, bytes]:
    """tokenizer_config.json as transformers reads it."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | extra
    config |= {k: v for k, v in {"bos_token": facts.bos_token, "eos_token": facts.eos_token}.items() if v}
    if facts.chat_template:
        config["chat_template"] = facts.chat_template
    return {"tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode()}


# --------------------------------------------------------------------- a sentencepiece model, written from the GGUF's lists


def sentencepiece_model(tokens: list[str], scores, types: list[int], metadata: Mapping, adds_space: bool) -> bytes:
    """The ModelProto (sentencepiece_model.proto) of a BPE model with byte fallback: pieces, trainer and normalizer."""
    pieces = b"".join(
        _message(1, _text(1, token) + b"\x15" + struct.pack("<f", score) + _number(3, kind or 1))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    unknown = types.index(UNKNOWN) if unknown is None and UNKNOWN in types else int(unknown or 0)
    trainer = (
        _number(3, 2) + _number(4, len(tokens)) + _number(35, 1) + _number(40, unknown)
    )  # BPE, size, byte fallback
    for field, name in ((41, "bos"), (42, "eos"), (43, "padding")):
        id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        trainer += _number(field, -1 if id is None else int(id))
    keeps_spaces = not _flag(metadata, "remove_extra_whitespaces", False)
    normalizer = _text(1, "identity") + _number(3, adds_space) + _number(4, not keeps_spaces) + _number(5, 1)
    return pieces + _message(2, trainer) + _message(3, normalizer)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())
