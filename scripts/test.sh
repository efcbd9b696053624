#!/usr/bin/env bash
# The CPU test suite and the style checks. Sets itself up on the first call; arguments go to pytest.
#   bash scripts/test.sh
#   bash scripts/test.sh -k mask -x
#   bash scripts/test.sh -m gpu        the tests that need a CUDA device
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
style=0
.venv/bin/python -m ruff check --quiet . || style=1
.venv/bin/python -m ruff format --check --quiet . || style=1
.venv/bin/python -m pytest -q -m "not gpu" "$@"
exit "$style"
