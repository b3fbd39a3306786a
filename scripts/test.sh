#!/usr/bin/env bash
# The tests, in an environment of their own, on up to four cores. Arguments go to pytest: scripts/test.sh -k golden
# Tests of a file stay together, because they share fixtures that take long. `-n 0` runs all in one process, for --pdb.
# There is one process more than cores, because ranks that start wait for each other; tests/conftest.py has the order.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv
ensure_mindformers
cd "$ROOT"
exec python -m pytest --timeout=900 -n "$(($(nproc) + 1))" --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
