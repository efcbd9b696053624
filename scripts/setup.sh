#!/usr/bin/env bash
# Makes .venv in the repository and installs requirements.txt into it. Every other script calls this first.
#   bash scripts/setup.sh                          or: source scripts/setup.sh
#   PYTHON=/usr/bin/python3.12 bash scripts/setup.sh   chooses the interpreter that makes .venv
# Run it as often as you like: if nothing changed, it only compares a checksum. After an interruption the next run
# resumes. If several run at once, one works and the others wait.

radial_setup() (
    set -euo pipefail
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    venv="$root/.venv" requirements="$root/requirements.txt"
    python="$venv/bin/python" stamp="$venv/setup.sha256"
    constraints="$venv/torch.txt" log="$venv/setup.log"

    is_done() {
        [[ -x "$python" && -f "$stamp" ]] && sha256sum --check --status "$stamp" 2>/dev/null
    }
    fail() {
        echo "error: $1" >&2
        exit 1
    }
    find_python() {
        local candidate candidates=(python3 python3.13 python3.12 python3.11)
        [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
        for candidate in "${candidates[@]}"; do
            "$candidate" -c 'import sys; sys.version_info < (3, 11) and sys.exit(1); print(sys.executable)' \
                2>/dev/null && return
        done
        fail "no Python 3.11 or newer among: ${candidates[*]}; set PYTHON=/path/to/python"
    }
    install() {
        echo "setup: installing $1 (log: $log)"
        "$python" -m pip install --disable-pip-version-check --progress-bar off "${@:2}" >>"$log" 2>&1 ||
            fail "pip could not install $1: $(grep -m1 '^ERROR' "$log" || echo 'no reason given'); whole log: $log"
    }
    make_venv() {
        "$python" -m pip --version >/dev/null 2>&1 && return
        local base
        base="$(find_python)" || exit 1
        echo "setup: making .venv with $base ($("$base" -V))"
        "$base" -m venv --clear "$venv" >/dev/null 2>&1 ||
            fail "$base -m venv $venv failed; on Debian and Ubuntu install python3-venv"
    }

    is_done && exit 0
    if command -v flock >/dev/null; then
        exec 9>"$root/.setup.lock"
        flock --nonblock 9 || { echo "setup: waiting for another run of it"; flock 9; }
        is_done && exit 0
    fi
    make_venv
    : >"$log"
    grep '^torch==' "$requirements" >"$constraints" || true
    if [[ -s "$constraints" ]]; then
        install "$(cat "$constraints")" -r "$constraints"
    fi
    install requirements.txt -r "$requirements" -c "$constraints"
    sha256sum "$requirements" >"$stamp.new"
    mv "$stamp.new" "$stamp"
    echo "setup: done"
)

radial_setup
