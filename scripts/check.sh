#!/usr/bin/env bash
# Everything that can be said about the code without running the tests; see ARCHITECTURE.md for the rooms.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv
cd "$ROOT"
ruff format --check .
ruff check .
mypy
python -m pytest --quiet tests/test_layering.py tests/test_vocabulary.py tests/test_seams.py
python -m pytest --quiet --doctest-modules ms_ckpt_ext
