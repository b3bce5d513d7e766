#!/usr/bin/env bash
# Known vulnerabilities of what constraints.txt pins, where pip-audit is installed and its service can be reached.
# Exceptions, each with a reason: none.
set -uo pipefail
bin=${1:-.venv/bin}
if ! [ -x "$bin/pip-audit" ]; then
  echo "pip-audit skipped: it is not installed (pip install pip-audit)"
  exit 0
fi
said=$(timeout 120 "$bin/pip-audit" --requirement constraints.txt --no-deps --disable-pip --progress-spinner off 2>&1)
code=$?
if [ $code -ne 0 ] && grep -qiE "connection|resolve|timed out|service|unreachable|max retries" <<<"$said"; then
  echo "pip-audit skipped: its service cannot be reached"
  exit 0
fi
echo "$said"
unknown=$(grep -c "could not be audited" <<<"$said")
pinned=$(grep -cE "^[A-Za-z0-9]" constraints.txt)
[ "$unknown" -ge "$pinned" ] && echo "pip-audit skipped: its service knows none of the $pinned packages"
exit $code
