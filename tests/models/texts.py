"""Strings of many kinds, the same in every run."""

from __future__ import annotations

import random


def _words(text: str) -> list[str]:
    return text.split()


_WORDS = _words(
    "the quick brown fox jumps over lazy dogs I'm you're we'll THEY'VE isn't it'd naïve café Straße Ærøskøbing "
    "don’t e.g. U.S.A. attention KV-cache snake_case camelCase __init__ 0x1F 3.14159 1e-5 2024-02-29 12:34:56"
)
_CODE = (
    "def f(x: int) -> list[int]:\n    return [x**2 for x in range(10)]\n",
    '\tif (a && b || !c) { printf("%d\\n", a[i++]); }\n',
    "#include <cstdint>\r\ntemplate <typename T> struct S { T* p{nullptr}; };\r\n",
    "SELECT * FROM \"t\" WHERE a >= 10 AND b LIKE '%x%';",
    "<div class='a'>&nbsp;&lt;b&gt;</div><!-- c -->",
    '{"k": [1, 2.5, -3e10, null, true], "s": "\\u00e9"}',
    "$ grep -rn 'foo' ./src | sort -u > out.txt 2>&1",
    "https://example.org/a/b?q=1&r=%20#frag",
    "\\frac{a}{b} \\sum_{i=0}^{n} x_i^2",
)
_SCRIPTS = (
    "Привет, мир! Как дела?",
    "你好，世界。今天天气怎么样？",
    "こんにちは世界、カタカナとひらがな",
    "안녕하세요 세계",
    "مرحبا بالعالم ١٢٣",
    "שלום עולם",
    "नमस्ते दुनिया १२३",
    "สวัสดีชาวโลก",
    "Γειά σου Κόσμε",
    "e\u0301 vs \u00e9, A\u030a vs \u00c5, \u1100\u1161",
    "½ ² Ⅷ ① ３４ 𝟘𝟙",
    "😀👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽",
    "“quotes” — dash … ellipsis • bullet",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠜎",
)
_SPACES = (" ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "\r\n", "\u00a0", "\u2003", "\u3000", "     ", "\n    ", "")
_NUMBERS = ("7", "42", "007", "1234567890", "3.14", "1,000,000", "-5", "1/2", "10%", "٣", "2²")
_ODD = (
    "\x00",
    "\x07",
    "\x7f",
    "\ufeff",
    "\u200b",
    "\u202e",
    "\ue000",
    "\uffff",
    "\U0010ffff",
    "'",
    "''",
    '"',
    "`",
    "~",
)


def texts(count: int, seed: int, special_tokens: tuple[str, ...] = ()) -> list[str]:
    """``count`` strings of 1 to 12 pieces: words, code, scripts, digits, whitespace, oddities, special tokens."""
    rng = random.Random(seed)

    def piece() -> str:
        kinds = [_WORDS, _WORDS, _CODE, _SCRIPTS, _NUMBERS, _ODD, special_tokens or _WORDS]
        kind = rng.randrange(len(kinds) + 1)
        if kind < len(kinds):
            return rng.choice(kinds[kind])
        return "".join(chr(rng.choice((rng.randrange(32, 0x250), rng.randrange(0x2000, 0xD800)))) for _ in range(5))

    found = ["", " ", "  ", "\n", " a", "a ", "12 345"]
    while len(found) < count:
        parts = [piece() + rng.choice(_SPACES) for _ in range(rng.randrange(1, 13))]
        found.append(rng.choice(("", "", " ", "  ", "\n")) + "".join(parts))
    return found
