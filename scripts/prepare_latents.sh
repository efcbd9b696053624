#!/usr/bin/env bash
# Encodes videos and captions as the latents and text embeddings that LoRA training reads. The same command resumes.
#   bash scripts/prepare_latents.sh configs/train/wan_2x.yaml data.folder=videos/             mp4 files, each with a .txt
#   bash scripts/prepare_latents.sh configs/train/wan_2x.yaml data.table=videos.csv           columns video and caption; or a .jsonl
#   bash scripts/prepare_latents.sh configs/train/wan_2x.yaml data.folder=videos/ --dry-run   checks the videos, loads no model
#   bash scripts/prepare_latents.sh --help                                                    every key
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.prepare_latents "$@"
