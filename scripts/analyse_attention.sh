#!/usr/bin/env bash
# Measures where a model's attention lies: curves over temporal and spatial distance with exponential fits, classes
# of heads, the attention in each band of the mask, a bound on the dropped part. Writes tables and a
# picture to outputs/results; --out names another folder.
#   bash scripts/analyse_attention.sh                                             the bundled Wan, a minute
#   bash scripts/analyse_attention.sh configs/wan2.1_t2v_14b.yaml --steps 1 13 50
#   bash scripts/analyse_attention.sh configs/mochi_tiny.yaml --timestep 500      one call on noise
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.analyse_attention "$@"
