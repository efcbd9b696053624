#!/usr/bin/env bash
# Trains a LoRA for longer video with Mochi 1, on latents of scripts/prepare_latents.sh and all GPUs of this machine.
# After a stop the same command resumes.
#   bash scripts/prepare_latents.sh configs/train/mochi_4x.yaml data.folder=videos/
#   bash scripts/mochi_lora_train.sh configs/train/mochi_4x.yaml
#   NPROC=8 bash scripts/mochi_lora_train.sh configs/train/mochi_4x.yaml parallel.ulysses_degree=4 train.rate=5e-5
#   bash scripts/mochi_lora_train.sh configs/train/mochi_4x.yaml --dry-run
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.launch \
    --module=scripts.train_lora "$@"
