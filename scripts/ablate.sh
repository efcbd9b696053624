#!/usr/bin/env bash
# Measures what dense steps and layers, decay, density, block size, sink, neighbour and other static masks do to the
# video: PSNR and SSIM to the dense run, attention recall and output error, prompt accuracy, seconds.
# Writes a table and a picture to outputs/results; --out names another folder.
#   bash scripts/ablate.sh                          12 captions; 45 minutes on one core
#   bash scripts/ablate.sh --only dense_steps pattern --captions 4    some of the tables, with fewer captions
#   bash scripts/ablate.sh configs/mochi_tiny.yaml attention.dense_steps=2
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.ablate "$@"
