"""Open data files: recognise their kind, decompress them, and decode them to text."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from autosft.profiles.errors import UserError

#: Kinds of data files by suffix; `.jsonl.gz` is a compressed `.jsonl`.
KINDS = {
    ".json": ".json",
    ".jsonl": ".jsonl",
    ".ndjson": ".jsonl",
    ".jsonlines": ".jsonl",
    ".csv": ".csv",
    ".tsv": ".tsv",
    ".jl": ".jsonl",
    ".parquet": ".parquet",
    ".pq": ".parquet",
    ".arrow": ".arrow",
    ".feather": ".arrow",
    ".txt": ".txt",
}
SUPPORTED = (
    "a .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow or .txt file with at least one record, "
    "plain or compressed (.gz, .zst, .bz2, .xz)"
)


def kind_of(path: Path) -> str | None:
    """Return the kind of a data file, a value of `KINDS`; None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _DECOMPRESSORS:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def is_compressed(path: Path) -> bool:
    """Return whether the suffix is of a compression that `open_bytes` handles."""
    return path.suffix.lower() in _DECOMPRESSORS


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading its uncompressed bytes.

    Raises `UserError`, also while reading, for a compressed file that is truncated or invalid.
    """
    decompress = _DECOMPRESSORS.get(path.suffix.lower()) or _by_content(path)
    if decompress is None:
        with path.open("rb") as stream:
            yield stream
        return
    try:
        with decompress(path) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise
        why = (str(error) or "it is cut off").splitlines()[0]
        raise UserError(
            f"{path} cannot be decompressed: {why}.",
            remedy="It was probably not copied or downloaded to its end, or its suffix is wrong.",
        ) from error


def head_of(path: Path) -> bytes:
    """Return the first bytes of a file's uncompressed content."""
    with open_bytes(path) as stream:
        return bytes(stream.read(_HEAD_BYTES))


def decode_head(head: bytes) -> str | None:
    """Decode the first bytes of a text file, which may end within a character; None if it is no text."""
    try:
        return codecs.getincrementaldecoder(encoding_of(head))().decode(head)
    except UnicodeDecodeError:
        return None


def _by_content(path: Path) -> Callable[[Path], Any] | None:
    """Return what decompresses a file that is compressed although its name does not say so."""
    with path.open("rb") as stream:
        head = stream.read(6)
    return next((_DECOMPRESSORS[suffix] for mark, suffix in _MAGIC.items() if head.startswith(mark)), None)


def read_text(path: Path) -> str:
    """Read a whole text file: UTF-8, or UTF-16 and UTF-32 with a byte order mark.

    Raises `UserError` with the line for bytes that are none of these.
    """
    with open_bytes(path) as stream:
        return decode(path, stream.read())


def decode(path: Path, data: bytes) -> str:
    """Decode the bytes of a text file, without its byte order mark; raises like `read_text`."""
    encoding = encoding_of(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            name = encoding.upper()
            raise UserError(
                f"{path}: not the {name} that its first bytes say (offset {error.start}: {error.reason}).",
                remedy=f"Convert it, for example: iconv -f {name} -t UTF-8 {path} > converted{path.suffix}",
            ) from error
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}).",
            remedy=f"Convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 {path} > converted{path.suffix}",
        ) from error


def encoding_of(head: bytes) -> str:
    """Detect the encoding of a text by its first bytes: a byte order mark, or the zeros of UTF-16's ASCII."""
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding
    # PowerShell and Excel write a mark; other programs may not.  ASCII in UTF-16 has every second byte zero.
    start = head[:64]
    if len(start) >= 4 and not any(start[1::2]) and all(start[::2][: len(start) // 2]):
        return "utf-16-le"
    if len(start) >= 4 and not any(start[::2]) and all(start[1::2]):
        return "utf-16-be"
    return "utf-8-sig"


def lines_of(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield the lines of a text file as UTF-8 bytes, and the offset at which each starts."""
    with open_bytes(path) as stream:
        head = stream.read(_HEAD_BYTES)
        encoding = encoding_of(head)
        if encoding == "utf-8-sig":
            start = head.removeprefix(codecs.BOM_UTF8)
            lines, offset = _joined(io.BytesIO(start), stream), len(head) - len(start)
        else:
            text = decode(path, head + stream.read())
            lines, offset = io.BytesIO(text.encode("utf-8", "surrogatepass")), 0
        for line in lines:
            yield line, offset
            offset += len(line)


def _joined(head: io.BytesIO, rest: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of two concatenated streams; the first may end within a line."""
    for line in head:
        yield line if line.endswith(b"\n") else line + rest.readline()
    yield from rest


def _open_zstd(path: Path) -> Any:
    import pyarrow as pa

    return _ArrowStream(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))


class _ArrowStream(io.RawIOBase):
    """An Arrow stream as a Python stream, which has lines."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


_DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(_open_zstd(path), 1 << 20),
    ".zstd": lambda path: io.BufferedReader(_open_zstd(path), 1 << 20),
}
#: What compressed files begin with.
_MAGIC = {b"\x1f\x8b\x08": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz"}
_BYTE_ORDER_MARKS = (  # UTF-32's first: it begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HEAD_BYTES = 1 << 16
