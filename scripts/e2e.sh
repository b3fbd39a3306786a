#!/usr/bin/env bash
# Every end-to-end run: real training on emulated NPUs, resumed and served under other layouts; all loads and transports,
# of which scripts/test.sh runs some; and what transformers makes of exported models. About 20 minutes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv
ensure_mindformers
ensure_torch
cd "$ROOT"
export MS_CKPT_EXT_E2E=all
exec python -m pytest --timeout=900 tests/e2e tests/bridge/mindformers tests/live tests/transport tests/engine/load/test_local_world.py "$@"
