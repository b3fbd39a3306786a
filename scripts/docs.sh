#!/usr/bin/env bash
# The API reference, made of the docstrings of all public names by pdoc: build/api/index.html, or in the folder given.
#     scripts/docs.sh [FOLDER]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

find_python
cd "$ROOT"
python -c 'import pdoc' 2>/dev/null || ensure_venv
out="${1:-build/api}"
python -m pdoc --docformat google --no-show-source --output-directory "$out" ms_ckpt_ext ms_ckpt_ext.rules ms_ckpt_ext.errors
say "The API reference is in $out/index.html"
