#!/usr/bin/env bash
# Sets everything up, then reshards a real 8-way checkpoint to 4 ranks under msrun on the CPU, and merges it.
# Every byte is compared with what MindSpore itself cut. Needs Python 3.9 to 3.12 with pip.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

ensure_venv
cd "$ROOT"
make_scratch

echo "Source: data parallel 2, tensor parallel 4, optimizer sharding: 8 ranks, weights and Adam states."
echo "Target: tensor parallel 4: 4 ranks."
scripts/demo/run.sh tests/data/golden "$scratch"
echo "Done: 8 to 4 ranks in two modes, and merged; not a byte differs."
