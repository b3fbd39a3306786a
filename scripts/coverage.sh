#!/usr/bin/env bash
# Branch coverage of ms_ckpt_ext/core by tests/core, which need no MindSpore. What is not covered is listed; below the
# least that pyproject.toml sets it fails. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv
python -c 'import coverage' 2>/dev/null || pip_install coverage
cd "$ROOT"
make_scratch
export COVERAGE_FILE="$scratch/coverage"
python -m coverage run -m pytest --quiet tests/core "$@"
python -m coverage report
