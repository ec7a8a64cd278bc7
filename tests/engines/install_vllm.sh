#!/usr/bin/env bash
# Install vLLM for CPUs and what TRL needs beside it into a virtual environment of its own (about 3.5 GB).
#   tests/engines/install_vllm.sh <folder>
# A folder that is already complete for the pinned versions is left as it is.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${1:?usage: install_vllm.sh <folder of the virtual environment>}
stamp="$venv/.installed"

if [ -f "$stamp" ] && cmp -s "$stamp" "$here/vllm_requirements.txt"; then
    exit 0
fi
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

# First the CPU build of torch alone: PyPI has no file of that name, and the largest mistake is the cheapest to report.
torch=$(grep -E '^torch==' "$here/vllm_requirements.txt")
if ! pip install --no-deps "$torch"; then
    echo "no index offers $torch: export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu and run this again." >&2
    exit 1
fi
# The list is complete and was resolved with overrides that pip does not know, so pip must not resolve it again.
pip install --no-deps --requirement "$here/vllm_requirements.txt"
"$venv/bin/python" "$here/_vllm_metadata.py"
cp "$here/vllm_requirements.txt" "$stamp"
