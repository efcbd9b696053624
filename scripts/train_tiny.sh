#!/usr/bin/env bash
# Trains a bundled model: by default Wan's (assets/wan-tiny) from nothing, about an hour and a half on two cores.
# It trains a VAE (bars vae_images, vae_clips, vae_outlines), encodes videos, and trains the text encoder together with
# the transformer. A run that was stopped resumes from its last checkpoint in outputs/train_*_tiny.
#   bash scripts/train_tiny.sh --out outputs/first    (the bundled Wan had a second run: results/bundled_models.md)
#   bash scripts/train_tiny.sh --family mochi     or hunyuan_video, or wan_i2v, which starts from assets/wan-tiny
#   bash scripts/train_tiny.sh --steps 8000 --batch 16 --out outputs/wan-tiny-longer --work outputs/train_longer
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.train_tiny "$@"
