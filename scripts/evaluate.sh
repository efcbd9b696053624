#!/usr/bin/env bash
# Compares radial videos with dense ones of the same prompts and seeds: PSNR, SSIM, LPIPS, attention recall and output
# error, seconds, operations, density. Writes videos, evaluation.json and a table. The same command resumes.
#   bash scripts/evaluate.sh                                        the bundled Wan against itself with dense attention
#   bash scripts/evaluate.sh configs/wan_tiny.yaml evaluate.prompts=assets/prompts/toyworld.txt evaluate.seeds=1,2,3
#   bash scripts/evaluate.sh configs/wan_tiny.yaml evaluate.compare="warm: attention.dense_steps=4; thin: attention.density=0.45"
#   bash scripts/evaluate.sh --folders dense=outputs/a radial=outputs/b    finished videos of the same names
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.evaluate "$@"
