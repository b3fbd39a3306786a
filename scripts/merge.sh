#!/usr/bin/env bash
# Merges a sharded checkpoint, on one host or in shares on several: see docs/inference.md.
#
#   scripts/merge.sh --help                       every option
#   scripts/merge.sh --config FILE [--dry-run]    what configs/ has examples of; options win over the file
#
# On several hosts: the same command on each, with --host-rank 0, 1, …
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

find_python
exec python -m ms_ckpt_ext.cli.launch merge "$@"
