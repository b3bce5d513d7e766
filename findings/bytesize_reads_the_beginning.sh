#!/usr/bin/env bash
# pydantic 2.14.3: ByteSize reads as much of a text as looks like a size and drops the rest without a word:
# "1,000MB" is 1 byte, "5-10GB" is 5 bytes, "1.5.5GB" is 1 byte and "16GB/2" is 16 GB.  Its pattern is matched at the
# beginning of the text and not to its end; "1 000 MB" and "1_000MB" are refused.
#
# Prints what was seen; exits 1 where it is otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pydantic==2.14.3
"$folder/venv/bin/python" - <<'PY'
import sys

from pydantic import VERSION, BaseModel, ByteSize, ValidationError


class Limits(BaseModel):
    disk: ByteSize


def read(text):
    try:
        return int(Limits(disk=text).disk)
    except ValidationError:
        return "refused"


EXPECTED = {
    "1000MB": 1_000_000_000, "1,000MB": 1, "5-10GB": 5, "1.5.5GB": 1, "16GB/2": 16_000_000_000,
    "1 000 MB": "refused", "1_000MB": "refused",
}
print("pydantic", VERSION)
seen = {text: read(text) for text in EXPECTED}
for text, value in seen.items():
    print(f"{text!r}: {value if value == 'refused' else f'{value:,} bytes'}")
sys.exit(0 if seen == EXPECTED else 1)
PY
