#!/usr/bin/env bash
# Makes videos from images with HunyuanVideo-I2V; with the bundled Wan image to video if no GPU has room.
# The first call sets up .venv. Works from any directory.
#   bash scripts/hunyuan_i2v_inference.sh
#   bash scripts/hunyuan_i2v_inference.sh generation.image=cat.jpg generation.prompt="the cat walks away"
#   bash scripts/hunyuan_i2v_inference.sh configs/hunyuan_i2v.yaml --dry-run    what it would need
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.generate \
    --preset=configs/hunyuan_i2v.yaml --bundled=configs/wan_i2v_tiny.yaml "$@"
