#!/usr/bin/env bash
# Random checkpoints and calls, run by stock MindSpore and by this package on equal copies: see tests/stock/fuzz.
#
#   scripts/fuzz.sh               2000 seeds, about five minutes
#   scripts/fuzz.sh --seed 7      one of them, told in full
#   scripts/fuzz.sh --help        every option
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

find_python
cd "$ROOT"
GLOG_v=4 exec python -m tests.stock.fuzz "$@"
