#!/usr/bin/env bash
# Measures how often a bundled model shows what the caption says, dense and radial; writes a table to
# outputs/results; --out names another folder.
#   bash scripts/prompt_accuracy.sh                                     all captions, 33 frames
#   bash scripts/prompt_accuracy.sh configs/wan_tiny.yaml configs/wan_tiny_4x.yaml --every 1 9     also every ninth, 129 frames
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.prompt_accuracy "$@"
