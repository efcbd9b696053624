#!/usr/bin/env bash
# Makes videos with Wan2.2-A14B, two experts in one denoising loop; with the bundled Wan and the same schedule if no GPU
# has room for both. Works from any directory.
#   bash scripts/wan22_t2v_inference.sh
#   bash scripts/wan22_t2v_inference.sh generation.prompt="a cat walks on the grass" generation.seed=1
#   bash scripts/wan22_t2v_inference.sh configs/wan2.2_t2v_a14b.yaml --dry-run    what it would need
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.generate \
    --preset=configs/wan2.2_t2v_a14b.yaml "$@"
