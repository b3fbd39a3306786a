#!/usr/bin/env bash
# `ms-ckpt merge` in the project's environment: merges a sharded checkpoint, on one host or in shares on several.
#
#   scripts/merge.sh --help    every option; see docs/inference.md
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

find_python
exec python -m ms_ckpt_ext merge "$@"
