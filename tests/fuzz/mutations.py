"""Files that are almost right: what a person, a program or a disk makes of a good one."""

from __future__ import annotations

from hypothesis import strategies as st

# ruff: noqa: E501
#: What parsers stumble over.
TOKENS = [
    b"", b"\x00", b"\xff", b"\n", b"\r\n", b'"', b"'", b"{", b"}", b"[", b"]", b":", b",", b"-", b"#", b"&a", b"*a",
    b"<<", b"!!", b"~", b"null", b"true", b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"9" * 40, b"9" * 5000,
    b"../..", b"/", b"%s", b"\\", b"\xe2\x80\xa8", b"\xf0\x9f\xa6\x99", b"\xed\xa0\x80", b"[" * 2000, b"- " * 2000,
    b"\x80\x04", b"PK\x03\x04", b"\x1f\x8b", b"GGUF", b"PAR1", b"SQLite format 3\x00",
]  # fmt: skip

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "delete", "repeat", "cut", "flip"]),
        st.floats(0, 1),
        st.integers(1, 64),
        st.sampled_from(TOKENS),
    ),
    min_size=1,
    max_size=6,
)


def changed(content: bytes, changes: list[tuple[str, float, int, bytes]]) -> bytes:
    """Return a file's content after some changes of it."""
    for how, place, length, token in changes:
        at = int(place * len(content))
        piece = content[at : at + length]
        match how:
            case "replace":
                content = content[:at] + token + content[at + length :]
            case "insert":
                content = content[:at] + token + content[at:]
            case "delete":
                content = content[:at] + content[at + length :]
            case "repeat":
                content = content[:at] + piece * 50 + content[at:]
            case "cut":
                content = content[:at]
            case "flip" if content:
                at = min(at, len(content) - 1)
                content = content[:at] + bytes([content[at] ^ (1 << length % 8)]) + content[at + 1 :]
    return content


#: Values as JSON and YAML have them, in the place of those that are meant.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "../..", "/", "\x00", "é" * 300, "9" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
