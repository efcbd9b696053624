#!/usr/bin/env bash
# Compares ways to four times the length of the bundled Wan: dense, RIFLEx, radial and other masks, with and without an
# adapter. Writes a table and two pictures to outputs/results; --out names another folder.
# After a stop the same command resumes.
#   bash scripts/length_study.sh                                    hours on two cores
#   bash scripts/length_study.sh --only dense radial radial_lora    some of the runs
#   bash scripts/length_study.sh train.rate=5e-4 --steps 300        other keys of generation and of LoRA training
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.length_study "$@"
