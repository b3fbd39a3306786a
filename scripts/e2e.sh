#!/usr/bin/env bash
# Every end-to-end run: real training on emulated NPUs, resumed and served under other layouts; live loads and
# transports with every number of ranks and in all modes of the emulator. About 20 minutes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv
cd "$ROOT"
unset PYTHONDONTWRITEBYTECODE
export MS_CKPT_EXT_E2E=all
exec python -m pytest --timeout=900 tests/e2e tests/live tests/transport "$@"
