"""Texts that tokenizers disagree about: scripts, emoji, code, odd whitespace, control characters, special tokens."""

from __future__ import annotations

import itertools
import random
import unicodedata

SENTENCES = """
The quick brown fox jumps over the lazy dog, doesn't it? They'll say: "WE'RE here", I'd've thought.
Größenwahn beißt übel — ça coûte 3,50 €; el niño comió piñas; žluťoučký kůň úpěl ďábelské ódy.
Zażółć gęślą jaźń. Pchnąć w tę łódź jeża lub ośm skrzyń fig. Þæt wæs gōd cyning! Kæmi ný öxi hér.
Съешь же ещё этих мягких французских булок, да выпей чаю. Ще не вмерла Україна. Жълтата дюля.
Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ὦ ξεῖν’, ἀγγέλλειν Λακεδαιμονίοις ὅτι τῇδε κείμεθα.
שלום עולם, מה שלומך היום? בְּרֵאשִׁית בָּרָא אֱלֹהִים אֵת הַשָּׁמַיִם וְאֵת הָאָרֶץ
مرحبا بالعالم، كيف حالك اليوم؟ بِسْمِ اللَّهِ الرَّحْمَٰنِ الرَّحِيمِ ۱۲۳ ٤٥٦ یہ اردو ہے۔
नमस्ते दुनिया, आप कैसे हैं? क्षत्रिय ज्ञान श्रृंखला १२३ বাংলা ভাষা ক্ষুদ্র ৪৫৬ ਪੰਜਾਬੀ ગુજરાતી ଓଡ଼ିଆ
தமிழ் மொழி வாழ்க தெலుగు తెలుగు భాష ಕನ್ನಡ ನುಡಿ മലയാളം ഭാഷ සිංහල ශ්‍රී ලංකා
สวัสดีชาวโลก วันนี้เป็นอย่างไรบ้าง ๑๒๓ ສະບາຍດີ ຊາວໂລກ မြန်မာဘာသာ ភាសាខ្មែរ សួស្តី
你好,世界!今天天氣怎麼樣?我有3個蘋果。這是一個測試句子。「引號」『雙引號』…… 〇一二三 𠮷野家 𪚥
こんにちは世界。カタカナとひらがな、漢字の混在した文章です。ﾊﾝｶｸ ｶﾞｷﾞｸﾞ １２３ＡＢＣ ㍿ ㌔ ㊙
안녕하세요 세계! 오늘 날씨가 어때요? 한글 맞춤법 ㅋㅋㅋ ㅠㅠ 각 각 ㄅㄆㄇ
ქართული ენა ᲥᲐᲠᲗᲣᲚᲘ Հայերեն լեզու ԵՐԵՎԱՆ አማርኛ ቋንቋ ትግርኛ ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ ꮳꮃꭹ ᐃᓄᒃᑎᑐᑦ ᠮᠣᠩᠭᠣᠯ བོད་སྐད་
Việt Nam đất nước ta ơi! Tiếng Việt có dấu: ắằẳẵặ Ǆǅǆ ﬁﬂ ſ K Ω Å ß ẞ ı İ
𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕄𝕒𝕥𝕙 𝟘𝟙𝟚 𐐔𐐯𐑅𐐨𐑉𐐯𐐻 𞤀𞤣𞤤𞤢𞤥 𓀀𓂀 𒀀𒁀 ꙮ 𐎠𐎡 𑀅𑀆 ꓐꓑ ⴰⵣⵓⵍ ߒߞߏ
H₂O + CO₂ ⇌ H₂CO₃; ∀x∈ℝ: ⌈x⌉ = −⌊−x⌋; ½ + ⅓ = ⅚; x² + y³ ≤ ∑∞; Ⅳ ⅻ ① ⑳ ㉑ ४ ٣ ๗ ꩙ 1️⃣ 10⁻⁹
👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇦🇯🇵🇧🇷 ❤️ ☺ ☺️ 🤷🏻‍♀️ 🧑🏿‍🚀 🫠🪿 ✅✔︎ 😀😃😄 #️⃣*️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ⌚️🕰 ㊗️
"""

CODE = [
    'def f(x: int = 0x1F) -> "str":\n    return f"{x!r:>10}"  # café\n\n\nclass A(B):\n\tpass\n',
    '#include <stdio.h>\r\nint main(void) { printf("%d\\n", 1e-9 > 0 ? 1 : 0); return 0; }\r\n',
    "const g = async (...args) => { await fetch(`https://x.yz/${args[0]}?q=1&r=%20`); };\n// ---------\n",
    "SELECT * FROM \"t\" WHERE a <> 'b''c' AND n >= 1000000 ORDER BY 1 DESC;",
    "<html><body class='x y'>&nbsp;&lt;p&gt;</body></html>\n<!-- done -->\n",
    '{"a": [1, 2.50, -3e+10, null, true], "b\\u00e9": {"c": ""}}',
    'for i in $(seq 1 10); do echo "$i: ${x:-none}" >> /tmp/a.log 2>&1 || exit 1; done',
    "fn main() -> Result<(), Box<dyn Error>> { let v: Vec<_> = (0..=9).map(|x| x << 2).collect(); Ok(()) }",
    "\\begin{equation} \\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2} \\end{equation}",
    "diff --git a/x b/x\n@@ -1,7 +1,7 @@\n-    old\n+    new\n \t  mixed\n",
    "| a | b |\n|---|:-:|\n| `1` | **2** |\n\n- [ ] item\n  1. nested\n> quote\n***\n",
    "ZWJ\u200d ZWNJ\u200c ZWSP\u200b BOM\ufeff SHY\u00ad LRM\u200e RLO\u202e WJ\u2060",
    "VS\ufe0e PUA\ue000 NC\ufdd0 \U0010fffd",
]

SPACES = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    "\x0b",
    "\x0c",
    "\x85",
    "\xa0",
    "\u1680",
    "\u2003",
    "\u2028",
    "\u202f",
    "\u3000",
    "\u200b",
    "\ufeff",
]
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<repo_name>",
    "<empty_output>",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "<|im_end",
    "|im_end|>",
    "<|im_start|",
    "<|IM_END|>",
]
NUMBERS = [
    "0",
    "7",
    "12",
    "123",
    "1234",
    "12345",
    "1234567890",
    "3.14159",
    "1,000,000",
    "2024-12-31",
    "23:59:59.999",
    "0x7fff",
    "1e-05",
    "-42",
    "+1",
    "12th",
    "v1.2.3",
    "192.168.0.1",
    "½¾",
    "٣٤٥٦",
    "१२३४",
    "１２３４",
    "𝟙𝟚𝟛",
    "Ⅳ",
    "²³",
    "①②③",
]
SUFFIXES = [
    "'s",
    "'S",
    "'t",
    "'T",
    "'re",
    "'RE",
    "'Re",
    "'rE",
    "'ve",
    "'VE",
    "'m",
    "'M",
    "'ll",
    "'LL",
    "'lL",
    "'d",
    "'D",
    "’s",
    "'ſ",
    "'x",
    "''s",
    "'",
    "n't",
]


# Where pre-tokenizers differ in what they take for whitespace.
WIDE_SPACES = ["y. \u2028", " \u202f", "!  \u3000?", "a\u3000 b", "\u2003x", "1 \u1680 2", "的\u3000 的"]


def lines() -> list[str]:
    return [*SENTENCES.strip().split("\n"), *CODE]


def words() -> list[str]:
    return sorted({word for line in lines() for word in line.split()})


def spaced() -> list[str]:
    """Every pair of kinds of whitespace, between and around words."""
    pairs = itertools.product(SPACES, repeat=2)
    placed = itertools.cycle(["a{}b", "{}x", "y.{}", "{}", "1{}2", "!{}?"])
    return [place.format("".join(pair)) for pair, place in zip(pairs, placed)]  # noqa: B905


def with_specials() -> list[str]:
    placed = ["{}", "a{}b", " {} ", "\n{}\n", "{0}{0}", "1{}2", "<{}>", "{}user\nHi{}\n"]
    return [place.format(*[token] * 2) for token in SPECIAL for place in placed]


def with_controls() -> list[str]:
    codes = [*range(0x20), *range(0x7F, 0xA0)]
    return [f"a{chr(code)}b {chr(code)} !{chr(code)}!" for code in codes]


def random_characters(rng: random.Random, count: int) -> list[str]:
    """Of all of Unicode that is assigned, few blocks at a time."""
    assigned = [c for c in range(0x20, 0x30000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    texts = []
    for _ in range(count):
        at = rng.randrange(len(assigned) - 200)
        near = assigned[at : at + rng.choice([3, 20, 200])]
        pool = [*near, *map(ord, rng.choice(["   ", " a", "19 ", "'s.", "\n\n "]))]
        texts.append("".join(chr(rng.choice(pool)) for _ in range(rng.randint(1, 14))))
    return texts


def mixtures(rng: random.Random, count: int) -> list[str]:
    """Words of all scripts joined by odd whitespace, numbers, suffixes and special tokens."""
    parts = [*words(), *NUMBERS, *NUMBERS]
    glue = ["", "", " ", " ", " ", *SPACES, *SUFFIXES, ",", ".\n", "...", "--", "/", "::", *SPECIAL[:3]]
    return ["".join(rng.choice(parts) + rng.choice(glue) for _ in range(rng.randint(2, 6))) for _ in range(count)]


def some_texts() -> list[str]:
    """A few of everything, for what is done with many tokenizers."""
    return [*texts()[::9], *WIDE_SPACES]


def texts() -> list[str]:
    """More than 2,000, always the same on one version of Python, none twice."""
    rng = random.Random(20260101)
    found = [
        "",
        *lines(),
        *words(),
        *NUMBERS,
        *(f"it{s} {s}" for s in SUFFIXES),
        *spaced(),
        *with_specials(),
        *with_controls(),
        *(n * c for c in (" ", "\n", "\t", "a", "!", "=", "🙂", "的", "7") for n in (3, 4, 7, 8, 17, 64)),
        *random_characters(rng, 500),
        *mixtures(rng, 500),
    ]
    return list(dict.fromkeys(found))
