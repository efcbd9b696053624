#!/usr/bin/env bash
# Makes videos with HunyuanVideo; with the bundled HunyuanVideo if no GPU has room.
# The first call sets up .venv. Works from any directory.
#   bash scripts/hunyuan_t2v_inference.sh
#   bash scripts/hunyuan_t2v_inference.sh generation.prompt="a cat walks on the grass" generation.seed=1
#   bash scripts/hunyuan_t2v_inference.sh configs/hunyuan_t2v.yaml --dry-run    what it would need
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.generate \
    --preset=configs/hunyuan_t2v.yaml --bundled=configs/hunyuan_tiny.yaml "$@"
