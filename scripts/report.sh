#!/usr/bin/env bash
# Writes one HTML page of the measurements of runs: videos side by side, tables, figures, masks. It needs no network.
#   bash scripts/report.sh outputs/evaluation/wan_tiny outputs/analysis/wan_tiny    folders of evaluate.sh, analyse_attention.sh, ...
#   bash scripts/report.sh outputs/wan_tiny --out report.html           a folder of generated videos
#   bash scripts/report.sh outputs/evaluation/wan_tiny --videos 2 --amplify 8    two prompts, the difference brighter
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.report "$@"
