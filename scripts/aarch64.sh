#!/usr/bin/env bash
# The tests about files on aarch64: Debian's Python for arm64 and wheels for aarch64, run by QEMU's emulation of user
# programs. Needs root (the kernel is told to start aarch64 programs by QEMU while this runs), apt-get, mmdebstrap and
# qemu-user-static. An hour on two cores; the environment (0.3 GB) is kept in .matrix for the next time.
#     scripts/aarch64.sh               # all
#     scripts/aarch64.sh tests/core    # arguments go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

home=${MS_CKPT_EXT_MATRIX:-$ROOT/.matrix}/aarch64
root=$home/root python=$home/root/usr/bin/python3.11
site=$root/usr/local/lib/python3.11/dist-packages # where this Python looks by itself, as do those that tests start
kernel=/proc/sys/fs/binfmt_misc rule=/usr/lib/binfmt.d/qemu-aarch64.conf # the rule comes with qemu-user-static
for tool in qemu-aarch64-static mmdebstrap; do
  command -v "$tool" >/dev/null || die "$tool is not here: apt-get install qemu-user-static mmdebstrap"
done
[[ -e $kernel/register ]] || mount -t binfmt_misc none "$kernel" || die "binfmt_misc cannot be mounted here"
if [[ ! -e $kernel/qemu-aarch64 ]]; then
  cat "$rule" >"$kernel/register" || die "this kernel cannot be told how to start aarch64 programs"
  trap 'echo -1 >"$kernel/qemu-aarch64"' EXIT
fi

if [[ ! -e $python ]]; then
  say "Fetching Python for arm64 into $root"
  rm -rf "$root" && mkdir -p "$home"
  mmdebstrap --quiet --variant=extract --architectures=arm64 --include=python3.11,libstdc++6 bookworm "$root"
  # QEMU takes what lies here for what has the same name on the machine, such as /tmp, or /dev/ptmx, which opens nothing.
  find "$root" -mindepth 1 -maxdepth 1 ! -name usr ! -name 'lib*' ! -name etc -exec rm -rf {} +
fi
stamp="$(cksum <"$ROOT/setup.py")"
if [[ $(cat "$site/.ms_ckpt_ext" 2>/dev/null) != "$stamp" ]]; then
  say "Fetching packages for aarch64 into $site"
  rm -rf "$site"
  host="$(pick_python)"
  mapfile -t needed < <(file_requirements "$host")
  pip=("$host" -m pip install --quiet --disable-pip-version-check --no-input --no-warn-conflicts --target "$site")
  "${pip[@]}" --only-binary=:all: --implementation cp --python-version 3.11 --platform manylinux_2_28_aarch64 \
    --platform manylinux2014_aarch64 "${needed[@]}"
  "${pip[@]}" --no-deps "$ROOT" # for its metadata; the code is that of the checkout
  echo "$stamp" >"$site/.ms_ckpt_ext"
fi

cd "$ROOT"
export QEMU_LD_PREFIX="$root" PYTHONPATH="$ROOT" MS_CKPT_EXT_EMULATED=1
unset PYTHONDONTWRITEBYTECODE
tests=("$@")
if [[ $# == 0 ]]; then tests=("${FILE_TESTS[@]}"); fi
"$python" -m pytest --quiet --timeout=1800 -n "$(nproc)" --dist loadfile -m "not stock and not msrun and not ascend" "${tests[@]}"
