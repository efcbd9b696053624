#!/usr/bin/env bash
# Computes attention FLOPs, kept blocks, density and predicted times over length and resolution, dense and radial,
# against n log n, and compares the paper's sparsities with ours. Writes a table and a picture to
# outputs/results; --out names another folder. Seconds.
#   bash scripts/cost.sh --models wan hunyuan --rate 400 300      TFLOP/s of a GPU's dense and radial kernels
#   bash scripts/cost.sh --models configs/wan2.1_t2v_14b_2x.yaml --frames 81 161 321 --size 720x1280
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.cost "$@"
