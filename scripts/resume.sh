#!/usr/bin/env bash
# Goes on with a training on any number of ranks: see docs/training-resume.md.
#
#   scripts/resume.sh --help                       every option
#   scripts/resume.sh --config FILE [--dry-run]    what configs/ has examples of; options win over the file
#
# On several hosts: the same command on each, with --host-rank 0, 1, …
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

find_python
exec python -m ms_ckpt_ext.cli.launch resume "$@"
