#!/usr/bin/env bash
# Opens a page in the browser to try the models: dense and sparse video side by side, with seconds, density and PSNR.
# It is on 127.0.0.1 alone, and sends nothing anywhere. The first call installs Gradio into .venv.
#   bash scripts/demo.sh
#   bash scripts/demo.sh --port 8000 --work outputs/tried
#   bash scripts/demo.sh --share            also a public link, by Gradio's servers
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/setup.sh"
python="$root/.venv/bin/python"
gradio="gradio>=6.31,<7" # as in pyproject.toml, which says why
if [[ "$("$python" -c "import gradio; print(gradio.__version__)" 2>/dev/null)" != 6.* ]]; then
    echo "setup: installing $gradio"
    "$python" -m pip install --disable-pip-version-check --quiet --progress-bar off "$gradio" || {
        echo "error: pip could not install $gradio, which the page needs; see above" >&2
        exit 2
    }
fi
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -P -m scripts.demo "$@"
