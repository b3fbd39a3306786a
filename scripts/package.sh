#!/usr/bin/env bash
# The package as users get it: the source distribution and, from that, the wheel are built and checked; then the wheel,
# installed into an empty environment and used outside this project, merges and loads. A few minutes; MindSpore is a
# download of 800 MB. MS_CKPT_EXT_MINDSPORE names another version of it, PYTHON another Python.
#     scripts/package.sh [FOLDER]    # where the two files are left (default: dist)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

python="$(pick_python)"
mkdir -p "${1:-$ROOT/dist}"
out="$(cd "${1:-$ROOT/dist}" && pwd)"
make_scratch
unset PYTHONPATH PYTHONHOME

"$python" -m venv "$scratch/tools"
"$scratch/tools/bin/python" -m pip install --quiet --disable-pip-version-check --no-input build twine
"$scratch/tools/bin/python" -m build --outdir "$scratch/dist" "$ROOT" >"$scratch/build.log" 2>&1 ||
  { tail -n 40 "$scratch/build.log" >&2; die "building the package failed"; }
"$scratch/tools/bin/twine" check --strict "$scratch"/dist/*
wheel=("$scratch"/dist/*.whl)

listing='import sys, zipfile; print(*sorted(n for n in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in n), sep="\n")'
diff <(cd "$ROOT" && find ms_ckpt_ext -type f ! -name '*.pyc' | LC_ALL=C sort) <("$python" -c "$listing" "${wheel[0]}") ||
  die "the wheel (right) does not hold the files of the package (left)"
echo "${wheel[0]##*/} holds every file of the package, built from the source distribution"

"$python" -m venv "$scratch/empty"
export VIRTUAL_ENV="$scratch/empty" PATH="$scratch/empty/bin:$PATH"
pip_install "${wheel[0]}" ${MS_CKPT_EXT_MINDSPORE:+"mindspore==$MS_CKPT_EXT_MINDSPORE"}
cp -R "$ROOT/scripts/demo" "$ROOT/tests/data/golden" "$scratch"
mkdir "$scratch/work"
cd "$scratch/work"
python -c "import ms_ckpt_ext, sys; sys.exit(not ms_ckpt_ext.__file__.startswith('$scratch/empty'))"
source=$scratch/golden/dp2_tp4_zero
ms-ckpt --version
ms-ckpt merge "$source/shards" merged --strategy "$source/strategy.ckpt"
ms-ckpt verify "$source/shards" merged --strategy "$source/strategy.ckpt"
"$scratch/demo/run.sh" "$scratch/golden" "$scratch"
mv "$scratch"/dist/* "$out"
echo "Done: $out has the source distribution and the wheel."
