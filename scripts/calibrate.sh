#!/usr/bin/env bash
# Measures what each head of a model needs, on dense videos of a few prompts, and writes a profile of under 1 MB. With
# attention.selection=profile attention.profile=FILE each head keeps the blocks it needs, and no step must be dense.
#   bash scripts/calibrate.sh configs/wan_tiny.yaml                                the bundled Wan, half a minute a prompt
#   bash scripts/calibrate.sh configs/wan2.1_t2v_14b.yaml generation.prompt_file=PROMPTS.txt
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.calibrate "$@"
