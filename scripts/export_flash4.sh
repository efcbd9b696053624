#!/usr/bin/env bash
# Compiles kernels of FlashAttention-4 into files of about 100 KB for a GPU machine without network; needs no GPU.
#   .venv/bin/python -m pip install '.[flash4]'
#   bash scripts/export_flash4.sh --out flash4
# Copy the folder to the GPU machine, which needs torch and apache-tvm-ffi, and name it in RADIAL_ATTN_FLASH4.
# PYTHON chooses another interpreter than .venv.
set -euo pipefail
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" # fake tensors make it warn
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[[ -n "${PYTHON:-}" ]] || bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-$root/.venv/bin/python}" -P -m scripts.export_flash4 "$@"
