#!/usr/bin/env bash
# Times dense SDPA, cpp, blocks and flex on radial masks of growing length; writes a table and a plot to
# outputs/results; --out names another folder.
#   bash scripts/benchmark.sh            2k to 32k tokens, 5 to 14 minutes on two quiet cores
#   bash scripts/benchmark.sh --quick    2k to 8k tokens, 5 minutes
#   bash scripts/benchmark.sh --mask     instead: the time to build the mask, and its growth with the video
#   bash scripts/benchmark.sh --quantized    instead: the error of attention on 8-bit operands
#   bash scripts/benchmark.sh --length       instead: training and inference steps at growing length
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.benchmark "$@"
