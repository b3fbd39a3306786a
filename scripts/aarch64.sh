#!/usr/bin/env bash
# The tests that need no MindSpore, on aarch64: a Python of Debian's for arm64 and wheels for aarch64, run by QEMU's
# emulation of user programs. Needs apt-get, mmdebstrap and qemu-user-static; as root it makes the kernel start aarch64
# programs by QEMU (binfmt_misc), without which tests that start processes are left out. An hour on two cores; the
# environment (0.3 GB) is kept in .matrix for the next time.
#     scripts/aarch64.sh                   # all
#     scripts/aarch64.sh tests/core        # arguments go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

home=${MS_CKPT_EXT_MATRIX:-$ROOT/.matrix}/aarch64
root=$home/root site=$home/site kernel=/proc/sys/fs/binfmt_misc
formats=/usr/lib/binfmt.d/qemu-aarch64.conf # comes with qemu-user-static
python=$root/usr/bin/python3.11             # of Debian 12
for tool in qemu-aarch64-static mmdebstrap; do
  command -v "$tool" >/dev/null || die "$tool is not here: apt-get install qemu-user-static mmdebstrap"
done

if [[ ! -e $python ]]; then
  say "Fetching Python for arm64 into $root"
  rm -rf "$root" && mkdir -p "$home"
  mmdebstrap --quiet --variant=extract --architectures=arm64 --include=python3.11 bookworm "$root"
fi
stamp="$(cat "$ROOT/setup.py" "$ROOT/pyproject.toml" | cksum)"
if [[ $(cat "$site/.ms_ckpt_ext" 2>/dev/null) != "$stamp" ]]; then
  say "Fetching packages for aarch64 into $site"
  rm -rf "$site"
  find_python
  python -m pip install --quiet --disable-pip-version-check --no-input --target "$site" --only-binary=:all: \
    --implementation cp --python-version 3.11 --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
    'numpy>=1.25,<2' safetensors tqdm xxhash protobuf 'cryptography>=35' 'shtab>=1.13' \
    'pytest>=8' pytest-timeout pytest-xdist hypothesis psutil
  echo "$stamp" >"$site/.ms_ckpt_ext"
fi
if [[ ! -e $kernel/register ]]; then mount -t binfmt_misc none "$kernel" || die "binfmt_misc cannot be mounted"; fi
if [[ ! -e $kernel/qemu-aarch64 ]]; then
  cat "$formats" >"$kernel/register" || die "the kernel takes no other programs than its own"
  trap 'echo -1 >"$kernel/qemu-aarch64"' EXIT
fi
