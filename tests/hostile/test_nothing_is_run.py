"""Nothing in a file is run: the package has no call that would do it. Read with `ast`, so comments do not count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent / "ms_ckpt_ext"
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "yaml",
    "torch",
    "code",
}
CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input", "execfile"}
METHODS = {
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "np.load",
    "np.loads",
    "np.fromregex",
    "numpy.load",
    "ms.load_mindir",
    "pickle.loads",
    "torch.load",
    "runpy.run_path",
    "runpy.run_module",
    "yaml.load",
    "logging.config.fileConfig",
}
IMPORTS_BY_NAME = {
    # module -> why it imports by a name that is no constant: all of them are names of this package, or of MindSpore's.
    "__init__.py": "public names, out of a table",
    "cli/main.py": "a command's module, out of a table",
    "formats/registry.py": "a format's module, out of a table",
    "formats/crypto/__init__.py": "a container's module, out of a table",
    "formats/crypto/backend.py": "parts of cryptography",
    "api/mindspore/install.py": "our functions in the place of MindSpore's, out of a table",
    "bridge/mindformers/legacy.py": "a module of MindFormers",
    "bridge/mindformers/seam.py": "modules of MindFormers, out of a table",
}


def found_in(source: str, path: str) -> Iterator[str]:
    """What may run something, as `path:line: what`."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if (node.module or "").split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            names = [called] if called in CALLS | METHODS else []
            names += ["shell=True"] if any(word.arg == "shell" for word in node.keywords) else []
            names += ["allow_pickle"] if any(word.arg == "allow_pickle" for word in node.keywords) else []
            if called.split(".")[-1] == "import_module" and not isinstance(node.args[0], ast.Constant):
                names += [] if path in IMPORTS_BY_NAME else ["an import by a name that is computed"]
        for name in names:
            yield f"{path}:{node.lineno}: {name}"


def test_the_package_runs_nothing_that_it_reads() -> None:
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}
    assert len(sources) > 200
    assert [line for path, source in sources.items() for line in found_in(source, path)] == []
    assert IMPORTS_BY_NAME.keys() <= sources.keys()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import marshal",
        "eval(text)",
        "exec(code)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(words, shell=True)",
        "os.system(text)",
        "importlib.import_module(name)",
        "yaml.load(text)",
    ],
)
def test_it_would_be_found(source: str) -> None:
    assert len([*found_in(source, "a.py")]) >= 1


def test_what_is_harmless_is_not() -> None:
    text = "from ast import literal_eval\nliteral_eval(key)\n# eval(x)\n'pickle'\nre.compile(x)\nimport_module('json')"
    assert [*found_in(text, "a.py")] == []


def test_literals_are_read_in_one_place() -> None:
    """`ast.literal_eval` calls nothing, but takes stack and time for long texts: who uses it bounds them."""
    users = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if "literal_eval" in path.read_text()]
    assert users == ["formats/discovery/mindformers_metadata.py"]
