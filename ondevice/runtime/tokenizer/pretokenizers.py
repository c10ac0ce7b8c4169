"""How byte-level BPE tokenizers cut text into words before merging: GGUF's `tokenizer.ggml.pre`, by name.

The expressions are llama.cpp's (src/llama-vocab.cpp), in the notation of the `tokenizers` library. Each is applied to
what the one before it left: its matches become words, and so does what lies between them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import Unsupported
from ...registry import did_you_mean


@dataclass(frozen=True)
class PreTokenizer:
    """ignore_merges: a word that is a token is one, whatever the merges say. add_bos: where the file does not say."""

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


def _any(*alternatives: str) -> str:
    return "|".join(alternatives)


def _letters(ranges: str) -> str:
    """A class of characters, from code points and ranges of them in hexadecimal. Whitespace within a range is left out,
    as in llama.cpp."""
    points = "".join(r"\x{" + part.replace("-", r"}-\x{") + "}" for part in ranges.split())
    return rf"[{points}&&[^\s]]"


SUFFIXES = r"'s|'t|'re|'ve|'m|'ll|'d"
ANY_CASE_SUFFIXES = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"  # with the one character in front, if it is no letter, digit or line's end
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
DIGIT, UP_TO_3_DIGITS = r"\p{N}", r"\p{N}{1,3}"

GPT2 = _any(SUFFIXES, r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)")
LLAMA3 = _any(ANY_CASE_SUFFIXES, LETTERS, UP_TO_3_DIGITS, SYMBOLS, SPACES)
QWEN2 = _any(ANY_CASE_SUFFIXES, LETTERS, DIGIT, SYMBOLS, SPACES)
QWEN35 = _any(
    ANY_CASE_SUFFIXES, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", DIGIT, r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", SPACES
)  # fmt: skip

# A word in mixed case is cut where small letters end. llama.cpp tells case apart in ASCII only.
NOT_SMALL, NOT_CAPITAL = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{NOT_SMALL}*{NOT_CAPITAL}+", rf"[^\r\n\p{{L}}\p{{N}}]?{NOT_SMALL}+{NOT_CAPITAL}*"
SYMBOLS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
TEKKEN = _any(*CASED, DIGIT, SYMBOLS_AND_SLASHES, SPACES)
GPT4O = _any(*(f"{word}{ANY_CASE_SUFFIXES}?" for word in CASED), UP_TO_3_DIGITS, SYMBOLS_AND_SLASHES, SPACES)

ASCII_SYMBOL_AND_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
DEEPSEEK3 = _any(
    ASCII_SYMBOL_AND_WORD, r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", r" ?[\p{P}\p{S}]+[\r\n]*", SPACES
)  # fmt: skip
DEEPSEEK_CASED = _letters(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C "
    "38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B "
    "1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 "
    "1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 "
    "2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B "
    "2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 "
    "FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943"
)
DEEPSEEK_PUNCTUATION = _letters("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
DEEPSEEK_EAST_ASIAN = _letters("4E00-9FA5 800-4E00 AC00-D7FF")
HAN_AND_KANA = _letters("4E00-9FA5 3040-309F 30A0-30FF")
YOUTU_SCRIPTS = _any(
    _letters("AC00-D7A3 3131-318E") + "+",
    _letters("FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F") + "+",
    _letters("3105-312F") + "+",
    HAN_AND_KANA + "+",
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
YOUTU = _any(
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{ANY_CASE_SUFFIXES}?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{ANY_CASE_SUFFIXES}?",
    DIGIT,
    SYMBOLS_AND_SLASHES,
    SPACES,
)
WIDE_SPACES = _any(*(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)), r"\s{1,2}(?!\S)", r"\s")

RULES: dict[PreTokenizer, str] = {  # what the names mean that GGUF files use
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): "default",
    PreTokenizer((GPT2,)): (
        "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert roberta-bpe jina-v1-en "
        "jina-v2-code mpt olmo jais trillion granite-docling exaone4"
    ),
    PreTokenizer((DIGIT, GPT2)): "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True): (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"
    ),
    PreTokenizer((LLAMA3,)): "dbrx smaug-bpe glm4 chatglm-bpe",
    PreTokenizer((QWEN2,)): "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan megrez solar-open grok-2",
    PreTokenizer((QWEN35,)): "qwen35",
    PreTokenizer((TEKKEN,), ignore_merges=True, add_bos=True): "tekken",
    PreTokenizer((GPT4O,)): "gpt-4o llama4 kanana2 talkie minimax-m2",
    PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?{DEEPSEEK_CASED}+",
            rf"\s?{DEEPSEEK_PUNCTUATION}+",
            r"\s+\z",
            f"{DEEPSEEK_EAST_ASIAN}+",
            r"\p{N}+",
        )
    ): "deepseek-llm",
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"{DEEPSEEK_EAST_ASIAN}+", DIGIT)): "deepseek-coder",
    PreTokenizer((UP_TO_3_DIGITS, f"{HAN_AND_KANA}+", DEEPSEEK3)): "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    PreTokenizer((YOUTU_SCRIPTS, YOUTU), ignore_merges=True): "youtu",
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")): "falcon",
    PreTokenizer((_any(ANY_CASE_SUFFIXES, LETTERS, UP_TO_3_DIGITS, SYMBOLS, r"\s*[\r\n]+", WIDE_SPACES),)): "jais-2",
    PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",)): "poro-chat bloom gpt3-finnish",
    PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+", DIGIT)): "viking",
    PreTokenizer((UP_TO_3_DIGITS, _any(ANY_CASE_SUFFIXES, LETTERS, r"\p{N}+", SYMBOLS, SPACES)), ignore_merges=True): (
        "minicpm5"
    ),
    PreTokenizer(
        (_any(r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])", LETTERS, DIGIT, SYMBOLS, r"\s*[\r\n]|\s+(?!\S)|\s+"),)
    ): "bailingmoe bailingmoe2 llada-moe",
    PreTokenizer((_any(ANY_CASE_SUFFIXES, LETTERS, DIGIT, r" ?[^\s\p{L}\p{N}\r\n]+", SPACES),)): "seed-coder",
    PreTokenizer((_any(LETTERS, DIGIT, SYMBOLS, SPACES),)): "ufakzeka",
    PreTokenizer((r"[^\n]+|[\n]+", QWEN2)): "laguna",
}
KINDS = {name: rule for rule, names in RULES.items() for name in names.split()}


def pretokenizer(name: str) -> PreTokenizer:
    """Raises Unsupported for a name that isn't known: a guess would give ids that the model was not trained on."""
    if name not in KINDS:
        raise Unsupported(f"The GGUF's pre-tokenizer {name!r} is not known here.", did_you_mean(name, KINDS))
    return KINDS[name]
