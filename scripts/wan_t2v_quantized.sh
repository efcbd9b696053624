#!/usr/bin/env bash
# Makes videos with Wan2.1-14B and int8 products in attention; likewise with the bundled Wan if no GPU has room.
# The first call sets up .venv. Works from any directory.
#   bash scripts/wan_t2v_quantized.sh
#   bash scripts/wan_t2v_quantized.sh generation.prompt="a cat walks on the grass" generation.seed=1
#   bash scripts/wan_t2v_quantized.sh configs/wan2.1_t2v_14b_quantized.yaml --dry-run    what it would need
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.generate \
    --preset=configs/wan2.1_t2v_14b_quantized.yaml --bundled=configs/wan_tiny_quantized.yaml "$@"
