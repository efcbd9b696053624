#!/usr/bin/env bash
# Makes videos with Wan. The first call sets up .venv. Works from any directory.
#   bash scripts/wan_t2v_inference.sh                                          the preset that suits this machine
#   bash scripts/wan_t2v_inference.sh configs/wan_tiny.yaml generation.seed=1  a preset, with a key changed
#   bash scripts/wan_t2v_inference.sh configs/wan2.1_t2v_14b.yaml --dry-run    what it would need, without weights
#   bash scripts/wan_t2v_inference.sh --help                                   every key
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.generate "$@"
