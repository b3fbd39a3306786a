#!/usr/bin/env bash
# Random checkpoints and calls, run by stock MindSpore and by this package on equal copies: see tests/stock/fuzz.
# Or input that is meant to hurt, for every parser of outside data: see tests/hostile.
#
#   scripts/fuzz.sh               2000 seeds, about five minutes
#   scripts/fuzz.sh --seed 7      one of them, told in full
#   scripts/fuzz.sh --help        every option
#
#   scripts/fuzz.sh parsers --minutes 60    all parsers; by coverage where atheris is installed (pip install atheris)
#   scripts/fuzz.sh parsers --help          every option
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

find_python
cd "$ROOT"
if [[ ${1:-} == parsers ]]; then
  shift
  exec python -m tests.hostile "$@"
fi
GLOG_v=4 exec python -m tests.stock.fuzz "$@"
