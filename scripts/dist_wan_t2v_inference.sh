#!/usr/bin/env bash
# Makes videos with Wan on all GPUs of this machine; without a GPU, with the bundled model in two processes.
#   bash scripts/dist_wan_t2v_inference.sh
#   NPROC=4 bash scripts/dist_wan_t2v_inference.sh configs/wan2.1_t2v_14b.yaml parallel.cfg_degree=1 generation.seed=1
#   bash scripts/dist_wan_t2v_inference.sh configs/wan2.1_t2v_14b.yaml --dry-run parallel.ulysses_degree=8
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.launch "$@"
