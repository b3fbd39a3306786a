#!/usr/bin/env bash
# Mutation testing of ms_ckpt_ext/core: see scripts/mutants/__main__.py.
#
#   scripts/mutants.sh                                  40 mutants of every module, about an hour on two idle cores
#   scripts/mutants.sh 'geometry/*' --sample 0          every mutant of some modules
#   scripts/mutants.sh exchange/plan --seed 7           others of one module
#   scripts/mutants.sh --help                           every option
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv
python -c 'import coverage, cosmic_ray' 2>/dev/null || pip_install coverage cosmic-ray
cd "$ROOT"
exec nice -n 19 python scripts/mutants "$@"
