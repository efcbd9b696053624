#!/usr/bin/env bash
# Runs diffusers' own model tests, unchanged and through a fork of ours at density 1.0; writes a table to
# outputs/results; --out names another folder.
#   git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers /tmp/diffusers
#   bash scripts/check_upstream.sh --source /tmp/diffusers                    Wan
#   bash scripts/check_upstream.sh --source /tmp/diffusers --family framepack another, see --help
#   bash scripts/check_upstream.sh --source /tmp/diffusers --own-package      the package of that tree
#   bash scripts/check_upstream.sh --source /tmp/diffusers -- -k Training     options after -- go to pytest
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$root/.venv/bin/python" -P -m scripts.check_upstream "$@"
