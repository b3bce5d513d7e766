"""Texts and conversations on which tokenizers and chat templates of two programs are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NUM_TEXTS = 200

_LANGUAGES = (
    "The quick brown fox doesn't jump over 12,345 lazy dogs.",
    "I'LL be there; we've 'told' her she'd better, and y'all'd've known it's THEIR'S.",
    "Größe, Übermut und weiße Füße: Straßenbahnhaltestellenschild.",
    "Où êtes-vous né ? L'été, à l'œuvre ; « ça va » — n'est-ce pas ?",
    "¿Cuántos años tenías? ¡Mañana será otro día, señor Ibáñez!",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "İstanbul'da ığdır şehri; Đặng Thị Ngọc Thịnh đã đến Hà Nội.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Їжак і ґава.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία, 3.14 φορές.",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה.",
    "أبجد هوز حطي كلمن، ٠١٢٣٤٥٦٧٨٩ مرحبا بالعالم!",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश।",
    "যাহা বাহান্ন তাহাই তিপ্পান্ন। யாமறிந்த மொழிகளிலே தமிழ்மொழி.",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน",
    "កាន់តែពិសេសអាច ខ្ញុំអាចញ៉ាំកញ្ចក់បាន",
    "我能吞下玻璃而不伤身体。东京2024年，价格：￥1,234.50元。",
    "我想在繁體中文裡測試：「引號」、『雙引號』——還有全形ＡＢＣ１２３。",
    "いろはにほへと ちりぬるを。カタカナとﾊﾝｶｸ、漢字かな交じり文。",
    "다람쥐 헌 쳇바퀴에 타고파. 값싼 책을 읽었다.",
    "ჟინჯი მთაწმინდა, Բարեւ ձեզ, ሰላም ለዓለም, ཤེས་རབ་",
    "🙂🚀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇯🇵 ❤️ 1️⃣ ☕︎",
    "e\u0301 versus é, a\u030a versus å, \ufb01 ligature, Ω versus Ω, ½ ² ₃ Ⅷ",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, ∑ᵢ₌₁ⁿ i² ≤ ∫₀^∞ e^{-x²} dx ≈ 0.886",
)
_CODE = (
    "def f(x: int) -> int:\n\treturn  x**2  # comment\n\n\nprint(f(3)!=9)\n",
    "for (let i = 0; i < n; i++) { a[i] += b?.c ?? `${x}`; }",
    'int main(void)\n{\n    printf("%5.2f\\n", 3.0f);\n    return 0;\n}\n',
    "SELECT COUNT(*) FROM t WHERE a<>'b''c' AND d>=10;",
    "<a href='x'>I'LL  be\r\nthere</a>   <!-- -->&nbsp;",
    '{"a": [1, 2.5e-3, null, true], "b": {"c": "\\u00e9\\n"}}',
    "#!/bin/sh\nset -eu; ls -la | grep '^d' && echo \"$HOME/${X:-y}\" >&2",
    "key: value\n  - item\n  - other: 'quoted'\n",
    "all:\n\tgcc -O2 -o $@ $<\n\n.PHONY: all\n",
    "--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n-old\n+new\n",
    "C:\\Users\\x\\file.txt https://example.org/a?b=c&d=%20#e user@example.com",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE __dunder__",
)
_SPACES = (
    "",
    " ",
    "a b  c   d    e     f      g       h        i",
    "\ttab\t\ttabs\t \t mixed \t",
    "line\nline\n\nline\n\n\nline\r\nline\r\n\r\nline\rline",
    "   leading and trailing   ",
    "\n\n  indented\n    more\n\n",
    "no\u00a0break\u2003em\u3000ideographic\u200bzero\u200djoiner\ufeffmark",
    "................ -------- ======== ________ ******** ########",
    "!!!???...,,,;;;:::\"\"\"'''``````",
)
_NUMBERS = (
    "0 1 12 123 1234 12345 123456 1234567 12345678 123456789",
    "3.14159, 1e-9, -42, +7, 0x1F, 1_000_000, 10:30, 2024-02-29, 99%, $5.00",
    "1st 2nd 3rd 4th, x1 y22 z333, a1b2c3d4",
)


def texts(special: Sequence[str]) -> tuple[str, ...]:
    """Return the texts: `NUM_TEXTS`, or more if a tokenizer has many special tokens (32 are used).

    Scripts, code, runs of blanks and numbers, each alone, after a blank, before a newline and next to
    another; every special token alone, inside words and repeated.
    """
    plain = (*_LANGUAGES, *_CODE, *_SPACES, *_NUMBERS)
    marked = [
        text
        for token in special[:32]
        for text in (token, f"word{token}word", f" {token} {token}{token}\nNext line")
    ]
    more = [
        *(f" {text}" for text in plain),
        *(f"{text}\n" for text in plain),
        *(f"{first}{second}" for first, second in zip(plain, reversed(plain), strict=True)),
        *(f"{first}\n\n{second}" for first, second in zip(plain, plain[7:], strict=False)),
    ]
    wanted = max(NUM_TEXTS - len(plain) - len(marked), 40)
    return (*plain, *marked, *more[:wanted])


_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für eine Stadt, «heute».",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "城市"},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
}
_QUESTION = {"role": "user", "content": "Was kostet das 東京-Ticket? <b>5 €</b>"}
_ANSWER = {"role": "assistant", "content": "Etwa 5 €.\n\n- naïve\n- «привет» 🙂"}
_CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "type": "function",
            "id": "call00001",
            "function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2], "exact": None}},
        }
    ],
}
_RESULT = {
    "role": "tool",
    "name": "weather",
    "tool_call_id": "call00001",
    "content": '{"t": 21.5, "ok": true}',
}

#: Conversations by content; these have plain turns only.
PLAIN: Mapping[str, Mapping[str, Any]] = {
    "a question": {"messages": [{"role": "user", "content": "Hello"}]},
    "a non-ASCII question": {"messages": [_QUESTION]},
    "a system message": {"messages": [{"role": "system", "content": "Sei kurz — 简短。"}, _QUESTION]},
    "several turns": {"messages": [_QUESTION, _ANSWER, {"role": "user", "content": "  Danke!  \n"}]},
}
STRUCTURED: Mapping[str, Mapping[str, Any]] = {
    "tools": {"messages": [_QUESTION], "tools": [_TOOL]},
    "a tool's call and result": {"messages": [_QUESTION, _CALL, _RESULT], "tools": [_TOOL]},
}
