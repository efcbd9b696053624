#!/usr/bin/env bash
# Trains a LoRA for longer video with Mochi 1, on latents that scripts/prepare_latents.sh made; on all GPUs of this machine.
# The same command goes on with a run that was stopped.
#   bash scripts/prepare_latents.sh configs/train/mochi_4x.yaml data.folder=videos/
#   bash scripts/mochi_lora_train.sh configs/train/mochi_4x.yaml
#   NPROC=8 bash scripts/mochi_lora_train.sh configs/train/mochi_4x.yaml parallel.ulysses_degree=4 train.rate=5e-5
#   bash scripts/mochi_lora_train.sh configs/train/mochi_4x.yaml --dry-run
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.launch \
    --module=scripts.train_lora "$@"
