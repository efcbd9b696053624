#!/usr/bin/env bash
# Runs the CPU test suite and the style checks. The first call sets up .venv; arguments go to pytest.
#   bash scripts/test.sh
#   bash scripts/test.sh -k mask -x
#   bash scripts/test.sh -m gpu        the tests that need a CUDA device
#   bash scripts/test.sh -m long       slow tests that other runs leave out, ten minutes
#   COMFYUI_PATH=/path/to/ComfyUI bash scripts/test.sh -m comfy     the node pack in a real ComfyUI, a minute; its
#                                      packages come from .venv, or from COMFYUI_PYTHON=/path/to/python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
style=0
.venv/bin/python -m ruff check --quiet . || style=1
.venv/bin/python -m ruff format --check --quiet . || style=1
# Test files are shared among processes of one thread, one a core, at most four. A GPU is not shared.
workers=$(($(nproc) < 4 ? $(nproc) : 4))
[[ " $* " == *" gpu "* ]] && workers=0 || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=.venv/bin/python
[[ " $* " == *" comfy "* ]] && python="${COMFYUI_PYTHON:-$python}" workers=0
"$python" -m pytest -q -m "not gpu and not long and not comfy" -n "$workers" --dist loadfile --no-loadscope-reorder --durations=15 "$@"
exit "$style"
