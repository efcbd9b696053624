#!/usr/bin/env bash
# Measures attention and denoising steps on one GPU, the goals first.
# Writes gpu_<name>_<date>.md to outputs/results; --out names another folder.
#   bash scripts/benchmark_gpu.sh                              at most 8 minutes
#   bash scripts/benchmark_gpu.sh --only wan-69 --skip-steps   one case; --help lists the options
#   bash scripts/benchmark_gpu.sh --device cpu --tiny          rehearsal without a GPU
# Installs nothing: PYTHON chooses the interpreter, else .venv or python3, whichever has torch that sees a GPU.
# A machine without a network needs the folder flash4 with exported kernels, and with packages in flash4/site:
#   bash scripts/export_flash4.sh --out flash4
#   pip install --no-deps --only-binary=:all: --python-version 3.12 --target flash4/site apache-tvm-ffi diffusers
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
probe='import sys
sys.version_info < (3, 11) and sys.exit(1)
import numpy, torch
sys.exit(0 if torch.cuda.is_available() else 3)'
candidates=("$root/.venv/bin/python" python3)
[[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
chosen=
for candidate in "${candidates[@]}"; do
    code=0
    "$candidate" -c "$probe" >/dev/null 2>&1 || code=$?
    if [[ $code == 0 ]]; then
        chosen="$candidate"
        break
    fi
    if [[ $code == 3 && -z "$chosen" ]]; then
        chosen="$candidate"
    fi
done
if [[ -z "$chosen" ]]; then
    echo "error: no Python 3.11 or newer with torch among: ${candidates[*]}; run bash scripts/setup.sh or set" \
        "PYTHON=/path/to/python" >&2
    exit 2
fi
carried="${RADIAL_ATTN_FLASH4:-$root/flash4}"
[[ ! -f "$carried/flash4.json" ]] || export RADIAL_ATTN_FLASH4="$carried"
[[ ! -d "$carried/site" ]] || PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$carried/site"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$chosen" -P -m scripts.benchmark_gpu "$@"
