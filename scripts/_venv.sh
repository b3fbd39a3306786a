# Sourced by the other scripts: ROOT, and a virtual environment that holds this project and its tools.
#
#   ensure_venv    makes it or brings it up to date, then puts it first on PATH
#   find_python    keeps the active environment if it has MindSpore and what this project needs; else ensure_venv
#   ensure_mindformers    adds MindFormers to the environment, for its tests
#   ensure_torch   makes another one with torch and transformers, for the tests that load what was exported
#   make_scratch   a temporary folder, `scratch`, which is removed at the end, when what was started has ended
#   file_requirements     what FILE_TESTS need, which are about files alone: they run without MindSpore
#
#   MS_CKPT_EXT_VENV   its folder                   (default: .venv in the project)
#   PYTHON             the interpreter it is made of (default: the first Python 3.9 to 3.12 on PATH)
#   MS_CKPT_EXT_MINDSPORE   the version of MindSpore  (default: the newest that setup.py allows)

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

FILE_TESTS=(tests/core tests/formats tests/storage tests/cli tests/engine/{copying,files,huggingface,integrity,source})

say() { printf '%s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

# Bash that is told to end by a signal leaves its children running.
make_scratch() { scratch="$(mktemp -d)" && trap 'end_descendants; rm -rf "$scratch"' EXIT; }

descendants() { # PID
  local child
  for child in $(cat /proc/"$1"/task/*/children 2>/dev/null); do echo "$child" && descendants "$child"; done
}

end_descendants() {
  local pids pid signal
  for signal in STOP STOP KILL; do # what is stopped starts nothing while the others are looked for
    mapfile -t pids < <(descendants $$)
    for pid in "${pids[@]}"; do kill -"$signal" "$pid" 2>/dev/null || true; done
  done
}

suits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

pick_python() {
  local name names=(python3 python3.11 python3.12 python3.10 python3.9)
  if [[ -n ${PYTHON:-} ]]; then names=("$PYTHON"); fi
  for name in "${names[@]}"; do
    if suits "$name"; then echo "$name"; return; fi
  done
  die "No Python that MindSpore has wheels for: 3.9 to 3.12, with venv and ensurepip, is needed (tried: ${names[*]})." \
    "Install one (Debian and Ubuntu: apt install python3 python3-venv) or name it: PYTHON=/path/to/python3.11 $0"
}

# What the environment was made for: another project directory, Python or list of requirements means a new install.
wanted_stamp() { { echo "$ROOT ${MS_CKPT_EXT_MINDSPORE:-}"; "$1" --version; cat "$ROOT/setup.py" "$ROOT/pyproject.toml"; } | cksum; }

make_venv() {
  local venv="$1" python
  if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
    die "$venv holds files and is no virtual environment: choose another directory in MS_CKPT_EXT_VENV"
  fi
  python="$(pick_python)"
  say "Making a virtual environment in $venv ($("$python" --version))"
  "$python" -m venv --clear "$venv"
}

ensure_venv() {
  local venv="${MS_CKPT_EXT_VENV:-$ROOT/.venv}" stamp
  suits "$venv/bin/python" || make_venv "$venv"
  stamp="$(wanted_stamp "$venv/bin/python")"
  if [[ $(cat "$venv/.ms_ckpt_ext" 2>/dev/null) != "$stamp" ]]; then
    "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null ||
      die "MindSpore cannot be imported without libgomp.so.1, which is not on this machine." \
        "Install it (Debian and Ubuntu: apt install libgomp1; openEuler and CentOS: yum install libgomp)."
    say "Installing ms-ckpt-ext and its tools (MindSpore is a download of 800 MB)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input -e "$ROOT[dev]" \
      ${MS_CKPT_EXT_MINDSPORE:+"mindspore==$MS_CKPT_EXT_MINDSPORE"}
    echo "$stamp" >"$venv/.ms_ckpt_ext"
  fi
  venv="$(cd "$venv" && pwd)"
  export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
  unset PYTHONHOME
  unset PYTHONDONTWRITEBYTECODE # tests start hundreds of processes, which would compile the package anew every time
}

# file_requirements PYTHON: what setup.py requires and the tests do, one a line, without MindSpore and what checks the code.
file_requirements() {
  "$1" - "$ROOT/setup.py" <<'PYTHON'
import ast, sys
assigned = [node for node in ast.parse(open(sys.argv[1]).read()).body if isinstance(node, ast.Assign)]
lists = {node.targets[0].id: node.value for node in assigned}
names = [name for key in ("REQUIRES", "DEV") for name in ast.literal_eval(lists[key])]
print(*(name for name in names if not name.startswith(("mindspore", "ruff", "mypy", "types-"))), sep="\n")
PYTHON
}

find_python() {
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
  local needed='import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ["mindspore", "tqdm", "xxhash"])))'
  python -c "$needed" 2>/dev/null || ensure_venv
}

pip_install() { python -m pip install --quiet --disable-pip-version-check --no-input "$@"; }

# MindFormers, for its tests: about half a minute and 650 MB. It is installed without its declared requirements, because
# one of them (hyper-parallel) is not on PyPI; what it imports stands in tests/bridge/mindformers/requirements.txt.
# MS_CKPT_EXT_MINDFORMERS=0 leaves it out, and its tests are skipped; any other value is the version to install.
ensure_mindformers() {
  local wanted="${MS_CKPT_EXT_MINDFORMERS:-2.0.0}" list="$ROOT/tests/bridge/mindformers/requirements.txt" stamp
  if [[ $wanted == 0 ]]; then return; fi
  stamp="$wanted $(cksum <"$list")"
  if [[ $(cat "$VIRTUAL_ENV/.mindformers" 2>/dev/null) != "$stamp" ]]; then
    say "Installing MindFormers $wanted for its tests"
    if ! { pip_install --requirement "$list" && pip_install --no-deps "mindformers==$wanted"; }; then
      if [[ -n ${CI:-} ]]; then die "MindFormers $wanted cannot be installed"; fi
      say "MindFormers $wanted cannot be installed; its tests are skipped"
      return
    fi
    echo "$stamp" >"$VIRTUAL_ENV/.mindformers"
  fi
  export MS_CKPT_EXT_REQUIRE_MINDFORMERS=1
}

# torch and transformers on the CPU, in an environment of their own: some hundreds of MB. MS_CKPT_EXT_TORCH_PYTHON names
# a Python that has them already; MS_CKPT_EXT_TORCH is what pip installs (a wheel without CUDA is the smallest).
ensure_torch() {
  local venv="$VIRTUAL_ENV-torch"
  if [[ -z ${MS_CKPT_EXT_TORCH_PYTHON:-} ]]; then
    if ! "$venv/bin/python" -c 'import torch, transformers' 2>/dev/null; then
      say "Making an environment with torch and transformers in $venv"
      python -m venv --clear "$venv"
      "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
        "${MS_CKPT_EXT_TORCH:-torch}" transformers==4.57.1 safetensors "numpy<2"
    fi
    MS_CKPT_EXT_TORCH_PYTHON="$venv/bin/python"
  fi
  export MS_CKPT_EXT_TORCH_PYTHON
}
