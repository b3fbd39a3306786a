#!/usr/bin/env bash
# All tests, in an environment of their own. Arguments go to pytest: scripts/test.sh -k golden
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv
ensure_mindformers
cd "$ROOT"
exec python -m pytest --timeout=900 "$@"
