#!/usr/bin/env bash
# Makes videos with Wan2.1-14B in 4 steps, by the lightx2v LoRA. If no GPU has room, it uses the bundled model with the
# same schedule and without the LoRA, which is for the 14B model. Works from any directory.
#   bash scripts/wan_t2v_lightx2v.sh
#   bash scripts/wan_t2v_lightx2v.sh generation.prompt="a cat walks on the grass" generation.seed=1
#   bash scripts/wan_t2v_lightx2v.sh configs/wan2.1_t2v_14b_lightx2v.yaml --dry-run    what it would need
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.generate \
    --preset=configs/wan2.1_t2v_14b_lightx2v.yaml "$@"
