#!/usr/bin/env bash
# Makes videos with HunyuanVideo on all GPUs of this machine; without a GPU, with the bundled HunyuanVideo in two processes.
#   bash scripts/dist_hunyuan_t2v_inference.sh
#   NPROC=4 bash scripts/dist_hunyuan_t2v_inference.sh configs/hunyuan_t2v.yaml parallel.cfg_degree=1 generation.seed=1
#   bash scripts/dist_hunyuan_t2v_inference.sh configs/hunyuan_t2v.yaml --dry-run parallel.ulysses_degree=8
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.launch \
    --preset=configs/hunyuan_t2v.yaml --bundled=configs/hunyuan_tiny.yaml "$@"
