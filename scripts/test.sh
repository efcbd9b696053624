#!/usr/bin/env bash
# Runs the CPU test suite and the style checks. The first call sets up .venv; arguments go to pytest.
#   bash scripts/test.sh
#   bash scripts/test.sh -k mask -x
#   bash scripts/test.sh -m gpu        the tests that need a CUDA device
#   bash scripts/test.sh -m long       slow tests that other runs leave out, ten minutes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
style=0
.venv/bin/python -m ruff check --quiet . || style=1
.venv/bin/python -m ruff format --check --quiet . || style=1
# Test files are shared among processes of one thread, one a core, at most four. A GPU is not shared.
workers=$(($(nproc) < 4 ? $(nproc) : 4))
[[ " $* " == *" gpu "* ]] && workers=0 || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
.venv/bin/python -m pytest -q -m "not gpu and not long" -n "$workers" --dist loadfile --no-loadscope-reorder --durations=15 "$@"
exit "$style"
