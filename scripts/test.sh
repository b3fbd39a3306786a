#!/usr/bin/env bash
# The tests, in an environment of their own, on up to four cores. Arguments go to pytest: scripts/test.sh -k golden
# Those of a file stay together, for they share what is dear to make. `-n 0` runs all in one process, as --pdb needs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv
ensure_mindformers
cd "$ROOT"
exec python -m pytest --timeout=900 -n logical --maxprocesses 4 --dist loadfile "$@"
