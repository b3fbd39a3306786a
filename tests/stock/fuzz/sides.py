"""Stock and ours: a call is run in a folder of its own, and what came of it is noted.

Stock runs with three of its habits changed, none of which is a result: its processes run in this one (a process that
dies is as silent as it is in stock), it does not wait for the machine's memory to be half free, and slices are made
contiguous before safetensors 0.8 sees them (`Side.helped`), for without that hardly any result of it is right.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from tests.stock.fuzz.cases import Case, Layouts, Network, Place, Slices
from tests.stock.fuzz.files import as_tensor, fill_layouts, read
from tests.stock.fuzz.model import Array

_TYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I8": "int8", "I16": "int16",
    "I32": "int32", "I64": "int64", "U8": "uint8", "BOOL": "bool_",
}  # fmt: skip
_DTYPES = {
    "Float32": "F32", "Float16": "F16", "BFloat16": "BF16", "Float64": "F64", "Int8": "I8", "Int16": "I16",
    "Int32": "I32", "Int64": "I64", "UInt8": "U8", "Bool": "BOOL",
}  # fmt: skip
LIMIT_SECONDS = 60


class Outcome(NamedTuple):
    """What came of a call: an error or a value, the files that are new or changed, the tensors of networks."""

    error: Optional[BaseException]
    value: Any
    files: dict[str, bytes]
    tensors: dict[str, dict[str, Array]]
    silent: tuple[BaseException, ...] = ()


def run(case: Case, side: str, root: Path, instead: Mapping[str, Callable[..., Any]] = {}) -> Outcome:
    """Run a case in `root`, which holds its input; with functions `instead` of this package's of these names."""
    before = _tree(root)
    networks: list[Any] = []
    arguments = [_resolve(each, root, networks) for each in case.arguments]
    named = {name: _resolve(each, root, networks) for name, each in case.named.items()}
    error, value, silent = None, None, []
    context = stock(silent, "raw" not in case.tags) if side == "stock" else ours("installed" in case.tags, instead)
    with context as functions, ranked(case.rank), quiet(), limited(), within(root):
        try:
            value = functions(case.function)(*arguments, **named)
            value = value.result() if hasattr(value, "result") else value
        except Exception as caught:
            error = caught
    files = {name: data for name, data in _tree(root).items() if before.get(name) != data}
    tensors = {name: _parsed(root / name) for name in files if name.endswith((".ckpt", ".safetensors"))}
    tensors = {name: held for name, held in tensors.items() if held is not None}
    for network in networks:
        tensors["network"] = {p.name: array_of(p) for p in network.get_parameters()}
    if type(value).__name__ == "Parameter":
        tensors["returned"] = {value.name: array_of(value)}
    if isinstance(value, dict) and "param_dict" in case.tags:
        tensors["returned"] = {name: array_of(p) for name, p in value.items()}
    return Outcome(error, normal(value, root), files, tensors, tuple(silent))


def _parsed(path: Path) -> Optional[dict[str, Array]]:
    try:
        return read(path)
    except Exception:  # a strategy file, or what no reader takes
        return None


def _tree(root: Path) -> dict[str, bytes]:
    """Every file but those that only this package writes."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_file() and not any(p.startswith((".ms_ckpt_ext", "ms_ckpt_ext.digests")) for p in name.split("/")):
            found[name] = path.read_bytes()
    return found


def _resolve(value: Any, root: Path, networks: list[Any]) -> Any:
    if isinstance(value, Place):
        return str(root / value.path) if value.path else str(root)
    if isinstance(value, Network):
        networks.append(_network(value))
        return networks[-1]
    if isinstance(value, Slices):
        import mindspore as ms

        return [ms.Parameter(as_tensor(array), name=value.name) for array in value.arrays]
    if isinstance(value, Layouts):
        return _messages(value)
    if isinstance(value, dict):
        return {key: _resolve(each, root, networks) for key, each in value.items()}
    if isinstance(value, list):
        return [_resolve(each, root, networks) for each in value]
    return value


def _messages(value: Layouts) -> dict[str, Any]:
    from mindspore.train.node_strategy_pb2 import ParallelLayouts

    found = {name: ParallelLayouts() for name in value.cuts}
    for name, cut in value.cuts.items():
        fill_layouts(found[name], cut)
    return found


def _network(value: Network) -> Any:
    import mindspore as ms

    cell = ms.nn.Cell()
    for number, (name, array) in enumerate(value.parameters.items()):
        poison = ms.Tensor(np.ones(array.shape), getattr(ms, _TYPES[array.dtype]))
        cell.insert_param_to_cell(f"p{number}", ms.Parameter(poison, name=name), False)
    return cell


def array_of(parameter: Any) -> Array:
    """The bits of a Parameter; of text, its characters."""
    if isinstance(parameter, str):
        return Array("str", np.frombuffer(parameter.encode(), np.uint8))
    held = parameter.asnumpy()
    return Array(_DTYPES[str(parameter.dtype)], np.array(held, order="C").view(f"u{held.itemsize}"))


def normal(value: Any, root: Path) -> Any:
    """A return value in a form that two sides can be compared by."""
    if isinstance(value, dict):
        return {normal(key, root): normal(each, root) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(normal(each, root) for each in value) if type(value) in (list, tuple) else None
    if isinstance(value, str):
        return value.replace(str(root), "<root>")
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if hasattr(value, "SerializeToString"):
        return value.SerializeToString(deterministic=True)
    kind = type(value).__name__
    return ("Parameter", value.name, value.requires_grad) if kind == "Parameter" else kind


class _Inline:
    """`multiprocessing.Process` and `Pool` in this process."""

    def __init__(self, silent: list[BaseException]) -> None:
        self.silent = silent

    def Process(self, target: Callable[..., Any], args: tuple[Any, ...] = ()) -> Any:
        def start() -> None:
            try:
                target(*args)
            except Exception as error:
                self.silent.append(error)

        return types.SimpleNamespace(start=start, join=lambda: None)

    def Manager(self) -> Any:
        return types.SimpleNamespace(list=list)

    @contextlib.contextmanager
    def Pool(self, processes: Optional[int] = None) -> Iterator[Any]:
        if processes is not None and processes < 1:
            raise ValueError("Number of processes must be at least 1")
        yield types.SimpleNamespace(imap=map)


@contextlib.contextmanager
def stock(silent: list[BaseException], helped: bool) -> Iterator[Callable[[str], Any]]:
    """MindSpore's own functions."""
    import mindspore
    import mindspore.parallel.checkpoint_transform as transform
    import mindspore.parallel.transform_safetensors as safetensors
    import mindspore.train.serialization as serialization

    inline = _Inline(silent)
    changes: list[tuple[Any, str, Any]] = [
        (safetensors, "mp", inline),
        (safetensors, "set_affinity_pid", lambda: None),
        (transform, "Pool", inline.Pool),
        (serialization, "mp", inline),
    ]
    if helped:
        for module in (safetensors, serialization):
            changes.append((module, "save_file", _contiguous(module.save_file)))
    kept = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield lambda name: getattr(mindspore, name, None) or getattr(mindspore.parallel, name)
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def _contiguous(save_file: Callable[..., None]) -> Callable[..., None]:
    def save(tensors: dict[str, Any], *arguments: Any, **named: Any) -> None:
        save_file({n: np.array(a, order="C") if isinstance(a, np.ndarray) else a for n, a in tensors.items()},
                  *arguments, **named)  # fmt: skip

    return save


@contextlib.contextmanager
def ours(installed: bool, instead: Mapping[str, Callable[..., Any]]) -> Iterator[Callable[[str], Any]]:
    """This package's functions: by their own names, or by MindSpore's after `install()`."""
    import mindspore

    import ms_ckpt_ext

    if not installed:
        yield lambda name: instead.get(name) or getattr(ms_ckpt_ext, name)
        return
    ms_ckpt_ext.install()
    try:
        yield lambda name: getattr(mindspore, name, None) or getattr(mindspore.parallel, name)
    finally:
        ms_ckpt_ext.uninstall()


@contextlib.contextmanager
def ranked(rank: int) -> Iterator[None]:
    """This process is rank `rank`, for stock as for ours."""
    import mindspore.communication as communication
    import mindspore.parallel._utils as utils
    import mindspore.parallel.checkpoint_transform as transform
    import mindspore.train.serialization as serialization

    places = [
        (transform, "get_rank"),
        (serialization, "get_rank"),
        (communication, "get_rank"),
        (utils, "_get_global_rank"),
    ]
    kept = [(module, name, getattr(module, name)) for module, name in places]
    for module, name in places:
        setattr(module, name, lambda *_: rank)
    try:
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars. They ask for a real text stream."""
    kept = sys.stdout
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = nowhere
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                yield
        finally:
            sys.stdout = kept


@contextlib.contextmanager
def within(folder: Path) -> Iterator[None]:
    """Paths that are not absolute, as a mistake may be, lead into this folder."""
    kept = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(kept)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A call that does not end is ended."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"not done after {LIMIT_SECONDS} s")

    kept = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, kept)
