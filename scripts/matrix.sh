#!/usr/bin/env bash
# The tests that speak to MindSpore, under each of its versions and of Python's, and those about files under each Python:
# an environment each (2 GB with MindSpore), kept in .matrix for the next time. About ten minutes each on two cores that
# have nothing else to do; a line per run, which says what passed; logs beside the environments. The emulated Ascend is
# built for each version's own plugin.
#     scripts/matrix.sh                      # all
#     scripts/matrix.sh 2.8.0:3.11 none:3.9  # MindSpore:Python
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

home=${MS_CKPT_EXT_MATRIX:-$ROOT/.matrix}
tests=(tests/formats tests/api/mindspore tests/engine/files/test_encrypt.py tests/engine/files/test_encrypt_digests.py tests/bridge tests/stock tests/live tests/test_package.py)
pairs=("$@")
if [[ $# == 0 ]]; then
  pairs=(2.7.2:3.11 2.8.0:3.11 2.9.0:3.11 2.10.0:3.11 2.9.0:3.9 2.10.0:3.10 2.10.0:3.12 none:{3.9,3.10,3.11,3.12})
fi
mkdir -p "$home"
failed=0

run() { cd "$ROOT" && python -m pytest --quiet --timeout=900 -n logical --maxprocesses 4 --dist loadfile "$@"; }

one() ( # MINDSPORE PYTHON: in a shell of its own, for each has an environment of its own
  export PYTHON="python$2" MS_CKPT_EXT_VENV="$home/$1-$2" MS_CKPT_EXT_MINDSPORE=$1 MS_CKPT_EXT_MINDFORMERS=0
  if [[ $1 != none ]]; then
    ensure_venv && run "${tests[@]}"
    return
  fi
  suits "$MS_CKPT_EXT_VENV/bin/python" || make_venv "$MS_CKPT_EXT_VENV" || return 1
  export PATH="$MS_CKPT_EXT_VENV/bin:$PATH"
  mapfile -t needed < <(file_requirements python)
  pip_install "${needed[@]}" && pip_install --no-deps -e "$ROOT" || return 1
  run -m "not stock and not msrun and not ascend" "${FILE_TESTS[@]}"
)

for pair in "${pairs[@]}"; do
  log="$home/${pair/:/-}.log" start=$SECONDS
  one "${pair%:*}" "${pair#*:}" >"$log" 2>&1 || { failed=1 && echo "WRONG, see $log:"; }
  echo "MindSpore ${pair%:*}, Python ${pair#*:}: $(tail -n 1 "$log") ($((SECONDS - start)) s)"
done
exit $failed
