"""The package as an installed thing: what importing it costs, and what it promises to have."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.resources
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import ms_ckpt_ext

# Heavy, optional or only for some jobs: never loaded by the import alone.
NOT_LOADED = {"mindspore", "numpy", "google.protobuf", "cryptography", "matplotlib", "psutil", "safetensors", "tqdm"}
MOST_MODULES = 40
"""Modules that `import ms_ckpt_ext` may load beyond those Python has loaded by itself."""


def loaded_by(statement: str, tmp_path: Path) -> set[str]:
    """Modules that the statement loads in a new process."""
    code = f"import sys, json\nbefore = set(sys.modules)\n{statement}\nprint(json.dumps([*{{*sys.modules}} - before]))"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout))


def test_import_is_light(tmp_path: Path) -> None:
    loaded = loaded_by("import ms_ckpt_ext", tmp_path)
    assert "ms_ckpt_ext" in loaded
    assert not loaded & NOT_LOADED
    assert len(loaded) <= MOST_MODULES, sorted(loaded)


MERGE_MODULES = 40
"""Modules of this package, doors of rooms aside, that a merge of safetensors shards may load."""


def test_a_merge_loads_what_it_needs(tmp_path: Path) -> None:
    source = Path(__file__).resolve().parent / "data/golden/dp2_tp2"
    merge = f"ms_ckpt_ext.merge({str(source / 'shards')!r}, 'out', strategy={str(source / 'strategy.ckpt')!r})"
    loaded = loaded_by(f"import ms_ckpt_ext; {merge}", tmp_path)
    package = Path(ms_ckpt_ext.__file__).parent.parent
    own = {name for name in loaded if (package / f"{name.replace('.', '/')}.py").is_file()}
    assert {"ms_ckpt_ext.engine.files.merge", "ms_ckpt_ext.storage.staging"} <= own
    assert len(own) <= MERGE_MODULES, sorted(own)
    assert not {"cryptography", "mindspore", "ms_ckpt_ext.formats.ckpt", "ms_ckpt_ext.formats.crypto.keys"} & loaded


def test_files_and_rooms_are_small() -> None:
    """What is larger is split along a seam, or says the same in less."""
    root = Path(ms_ckpt_ext.__file__).parent
    long = {path: len(path.read_text("utf-8").splitlines()) for path in root.rglob("*.py")}
    assert {str(path.relative_to(root)): lines for path, lines in long.items() if lines > 350} == {}
    rooms = Counter(path.parent for path in long if path.name != "__init__.py")
    assert {str(room.relative_to(root)): count for room, count in rooms.items() if count > 14} == {}


SLOW = {"numpy", "logging", "dataclasses", "inspect", "traceback", "ctypes", "xxhash", "concurrent.futures"}
"""Modules of others that take as long to import as all that a command needs to begin."""


@pytest.mark.parametrize(("words", "most"), [(["--version"], 5), (["inspect", "FILE"], 38), (["merge", "--help"], 10)])
def test_a_command_starts_with_what_it_needs(words: list[str], most: int, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_file({"w": np.ones((2, 3), np.float32), "scale": np.ones((), np.float32), "step": np.ones(1, np.int64)}, file)
    argv = [str(file) if word == "FILE" else word for word in words]
    loaded = loaded_by(
        "import contextlib, io; from ms_ckpt_ext.cli.main import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()): assert main({argv!r}) == 0",
        tmp_path,
    )
    package = Path(ms_ckpt_ext.__file__).parent.parent
    own = {name for name in loaded if (package / f"{name.replace('.', '/')}.py").is_file()}
    assert not loaded & SLOW
    assert len(own) <= most, sorted(own)


NEED_MINDSPORE = {"CheckpointRecorder"}
"""A class of MindSpore's is its base."""


@pytest.mark.parametrize("name", sorted(set(ms_ckpt_ext.__all__) - {"__version__"} - NEED_MINDSPORE))
def test_public_names_do_not_need_mindspore(name: str, tmp_path: Path) -> None:
    # None in sys.modules makes `import mindspore` fail, as on a machine that lacks it.
    loaded = loaded_by(f"sys.modules['mindspore'] = None\nfrom ms_ckpt_ext import {name}", tmp_path)
    assert not {module for module in loaded if module.startswith("mindspore.")}


SETUP = Path(ms_ckpt_ext.__file__).parent.parent / "setup.py"


def told(keyword: str) -> Any:
    """What setup.py says under this keyword. Read, not run: setuptools need not be installed."""
    calls = [node for node in ast.walk(ast.parse(SETUP.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return ast.literal_eval(next(k.value for call in calls for k in call.keywords if k.arg == keyword))


def test_data_files_go_into_the_wheel() -> None:
    """What is no Python lies in the wheel only where setup.py says so; scripts/package.sh looks into a wheel."""
    root = Path(ms_ckpt_ext.__file__).parent
    globs = told("package_data")["ms_ckpt_ext"]
    named = {path for glob in globs for path in root.glob(glob)}
    assert all(list(root.glob(glob)) for glob in globs)
    data = {path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".so")}
    assert data and data == named


def test_every_folder_with_code_is_a_package() -> None:
    """`find_packages` passes over folders without an `__init__.py`."""
    folders = {path.parent for path in Path(ms_ckpt_ext.__file__).parent.rglob("*.py")}
    assert len(folders) > 10
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_command_is_there() -> None:
    (script,) = told("entry_points")["console_scripts"]
    name, _, target = script.partition(" = ")
    module, _, function = target.partition(":")
    assert name == "ms-ckpt"
    assert callable(getattr(importlib.import_module(module), function))


def test_the_metadata_names_the_pythons_that_scripts_take() -> None:
    """The oldest is told to pip, the newest is the last for which there are wheels of MindSpore."""
    pythons = re.findall(r"Python :: 3\.(\d+)", "\n".join(told("classifiers")))
    script = (SETUP.parent / "scripts/_venv.sh").read_text(encoding="utf-8")
    (bounds,) = re.findall(r"\(3, (\d+)\) <= sys.version_info\[:2\] <= \(3, (\d+)\)", script)
    assert pythons == [str(minor) for minor in range(int(bounds[0]), int(bounds[1]) + 1)]
    assert told("python_requires") == f">=3.{pythons[0]}"
    assert f"Python :: 3.{sys.version_info[1]}" in "\n".join(told("classifiers"))


def test_every_public_name_resolves() -> None:
    assert sorted(ms_ckpt_ext.__all__) == sorted(set(ms_ckpt_ext.__all__))
    for name in ms_ckpt_ext.__all__:
        assert getattr(ms_ckpt_ext, name) is getattr(ms_ckpt_ext, name)
    assert set(ms_ckpt_ext.__all__) <= set(dir(ms_ckpt_ext))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'ms_ckpt_ext' has no attribute 'nothing'"):
        ms_ckpt_ext.nothing  # noqa: B018


def test_version_is_the_installed_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", ms_ckpt_ext.__version__)
    assert importlib.metadata.version("ms-ckpt-ext") == ms_ckpt_ext.__version__


def test_requirements_pin_numpy_below_2() -> None:
    required = importlib.metadata.requires("ms-ckpt-ext") or []
    (numpy,) = [line for line in required if re.match(r"numpy\b", line)]
    assert "<2" in numpy
    assert any(re.match(r"mindspore>=", line) for line in required)


def test_types_are_shipped() -> None:
    assert importlib.resources.files("ms_ckpt_ext").joinpath("py.typed").is_file()


def test_without_mindspore_a_live_load_says_how_to_get_it(golden: Path) -> None:
    """Merging works, filling a network tells what to install."""
    code = (
        "import sys; sys.modules['mindspore'] = None\n"
        "from ms_ckpt_ext import load_distributed_checkpoint as f\n"
        f"f(object(), format='safetensors', unified_safetensors_dir={str(golden / 'full')!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "MissingDependencyError: this call needs MindSpore" in run.stderr
    assert "pip install 'mindspore>=2.7' 'numpy<2'" in run.stderr
