"""Where slices land, on 2 ranks: sink_worker.py CASE_DIR BUCKET. Every kind of Parameter, and what a load costs."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any, Callable, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import mint, nn
from mindspore.mint import distributed
from mindspore.nn.utils import no_init_parameters

from ms_ckpt_ext import load_distributed_checkpoint
from ms_ckpt_ext.api.measure import measure
from ms_ckpt_ext.bridge import memory
from ms_ckpt_ext.engine.load import profiles
from ms_ckpt_ext.errors import ChecksumError, LoadError, PeerError, UnsupportedError
from tests.support.checkpoints import read_file
from tests.support.reports import REPORTS, keep_reports

BUCKET = int(sys.argv[2])
KEY = bytes(range(32))
DTYPES = {"F32": ms.float32, "F16": ms.float16, "BF16": ms.bfloat16, "I32": ms.int32}
WITHOUT_META = ms.__version__.startswith("2.8.")
"""MindSpore 2.8 has no device "meta"."""


class Meter(NamedTuple):
    """What the emulated device counted."""

    used: int
    peak: int
    up: int
    down: int
    collectives: int
    link: int

    @staticmethod
    def read() -> Meter:
        ms.runtime.synchronize()
        acl, hccl = ctypes.CDLL("libascendcl.so"), ctypes.CDLL("libhccl.so")
        for call in (acl.cannemu_hbm_used, acl.cannemu_hbm_peak, acl.cannemu_copied):
            call.restype = ctypes.c_size_t
        for call in (hccl.cannemu_collectives, hccl.cannemu_link_bytes):
            call.restype = ctypes.c_size_t
        return Meter(
            acl.cannemu_hbm_used(), acl.cannemu_hbm_peak(), acl.cannemu_copied(1), acl.cannemu_copied(2),
            hccl.cannemu_collectives(), hccl.cannemu_link_bytes(),
        )  # fmt: skip


def cell_of(parameters: dict[str, ms.Parameter]) -> nn.Cell:
    cell = nn.Cell()
    for number, parameter in enumerate(parameters.values()):
        cell.insert_param_to_cell(f"p{number}", parameter, check_name_contain_dot=False)
    return cell


def poison(name: str, shape: tuple[int, ...], dtype: Any) -> ms.Parameter:
    return ms.Parameter(ms.Tensor(np.full(shape, 77), dtype), name=name)


def load(cell: nn.Cell, root: Path, mode: str, **options: Any) -> tuple[list[str], list[str]]:
    REPORTS.clear()
    return load_distributed_checkpoint(
        cell, None, root / "predicted.ckpt", root / "trained.ckpt", format="safetensors",
        unified_safetensors_dir=root / "source", mode=mode, bucket_bytes=BUCKET, **options,
    )  # fmt: skip


def raw(parameter: ms.Parameter) -> bytes:
    return np.ascontiguousarray(parameter.asnumpy()).tobytes()


def counted(root: Path, rank: int) -> None:
    """What one load takes of collectives, of bytes up, down and over the links, and of device memory; run first."""
    truth = read_file(root / f"expected/rank_{rank}/net.safetensors")
    cell = cell_of({name: poison(name, t.shape, DTYPES[t.dtype]) for name, t in truth.items()})
    load(cell, root, "cooperative")  # the pool of the backend takes its first blocks, the streams are made
    ms.runtime.empty_cache()
    before = Meter.read()
    ctypes.CDLL("libascendcl.so").cannemu_hbm_forget_peak()
    allocated = ms.runtime.memory_allocated()
    ms.runtime.reset_peak_memory_stats()
    load(cell, root, "cooperative")
    most = ms.runtime.max_memory_allocated() - allocated
    after = Meter.read()
    (report,) = REPORTS
    wanted = sum(len(t.data) for t in truth.values())
    print(
        "COUNTS",
        json.dumps(
            {"rounds": report.rounds, "read": report.reads.nbytes, "received": report.bytes_received, "wanted": wanted}
            | {"collectives": after.collectives - before.collectives, "link": after.link - before.link}
            | {"up": after.up - before.up, "down": after.down - before.down, "device": after.peak - before.used}
            | {"allocated": most}
        ),
        flush=True,
    )
    assert all(raw(p) == truth[p.name].data for p in cell.get_parameters())


def without_init(root: Path, rank: int, mode: str) -> None:
    """Parameters made under no_init_parameters get memory when they are filled."""
    truth = read_file(root / f"expected/rank_{rank}/net.safetensors")
    with no_init_parameters():
        cell = cell_of(
            {n: ms.Parameter(ms.common.initializer.initializer("ones", t.shape, DTYPES[t.dtype]), name=n)
             for n, t in truth.items()}
        )  # fmt: skip
    assert all(parameter.has_init for parameter in cell.get_parameters())
    assert load(cell, root, mode) == ([], [])
    for parameter in cell.get_parameters():
        assert not parameter.has_init
        assert raw(parameter) == truth[parameter.name].data, parameter.name


def not_yet_sliced(root: Path, rank: int, mode: str) -> None:
    """Parameters of full shape take their slice and its shape."""
    truth = read_file(root / f"expected/rank_{rank}/net.safetensors")
    full = json.loads((root / "shapes.json").read_text())
    cell = cell_of({n: poison(n, tuple(full[n]), DTYPES[t.dtype]) for n, t in truth.items()})
    assert load(cell, root, mode) == ([], [])
    for parameter in cell.get_parameters():
        assert tuple(parameter.shape) == truth[parameter.name].shape
        assert raw(parameter) == truth[parameter.name].data, parameter.name


def placed(root: Path, rank: int, mode: str) -> None:
    """Fresh and meta Parameters get device memory, and none of their old contents goes up; what is in host memory on
    purpose stays there; a storage format is refused by name."""
    truth = read_file(root / f"expected/rank_{rank}/net.safetensors")
    fresh = cell_of({n: poison(n, t.shape, DTYPES[t.dtype]) for n, t in truth.items()})
    before = [acl_uploaded(True), acl_uploaded(False)]
    load(fresh, root, mode)
    wanted = sum(len(t.data) for t in truth.values())
    went = [acl_uploaded(True) - before[0], acl_uploaded(False) - before[1]]
    assert all(parameter.device.startswith("Ascend") for parameter in fresh.get_parameters())
    read = wanted if mode == "direct" else REPORTS[0].reads.nbytes
    assert read <= went[0] <= read + 16 * len(truth) + 512, (went, read)  # 512: ranks meet
    assert went[1] == 0, went
    meta = cell_of({n: ms.Parameter(mint.empty(t.shape, dtype=DTYPES[t.dtype], device=None if WITHOUT_META else "meta"),
                                    name=n) for n, t in truth.items()})  # fmt: skip
    host = cell_of({n: ms.Parameter(ms.Tensor(np.full(t.shape, 77), DTYPES[t.dtype]), name=n, device="CPU")
                    for n, t in truth.items()})  # fmt: skip
    away = next(iter(fresh.get_parameters()))
    away._offload()
    for cell, where in ((meta, "Ascend"), (host, "CPU"), (fresh, "Ascend")):
        load(cell, root, mode)
        for parameter in cell.get_parameters():
            assert parameter.device.startswith("CPU" if parameter is away else where), parameter.name
            assert raw(parameter) == truth[parameter.name].data, parameter.name
    name = next(iter(truth))
    away.param_info.storage_format = "FRACTAL_NZ"
    try:
        load(fresh, root, mode)
    except UnsupportedError as error:
        assert repr(name) in str(error) and "FRACTAL_NZ" in str(error), error
    else:
        raise AssertionError("a storage format was not refused")


def formats(root: Path, rank: int, mode: str) -> None:
    """A Parameter that was converted to FRACTAL_NZ is refused by name, whatever it holds, and nothing was changed."""
    truth = read_file(root / f"expected/rank_{rank}/net.safetensors")
    for contents in (77, 0, None):
        cell = cell_of({n: poison(n, t.shape, DTYPES[t.dtype]) for n, t in truth.items()})
        load(cell, root, mode)
        for parameter in cell.get_parameters():
            if contents is not None:
                parameter.copy_(mint.full(parameter.shape, contents, dtype=parameter.dtype))
        before = {p.name: raw(p) for p in cell.get_parameters()}
        converted = next(p for p in cell.get_parameters() if p.name == "d.whole")
        converted.set_data(ms.ops.auto_generate.format_cast(converted, 29))
        assert raw(converted) == before["d.whole"]
        try:
            load(cell, root, mode)
        except (UnsupportedError, PeerError) as error:
            assert "'d.whole' has been given a format of its own" in str(error), error
        else:
            raise AssertionError("FRACTAL_NZ was not refused")
        assert {p.name: raw(p) for p in cell.get_parameters()} == before
        converted.set_data(mint.empty(converted.shape, dtype=converted.dtype))
        load(cell, root, mode)
        assert all(raw(parameter) == truth[parameter.name].data for parameter in cell.get_parameters())


def acl_uploaded(pinned: bool) -> int:
    """Bytes that went up from pinned memory, or from pageable."""
    ms.runtime.synchronize()
    count = ctypes.CDLL("libascendcl.so").cannemu_uploaded
    count.restype = ctypes.c_size_t
    return sum(int(count(int(pinned), later)) for later in (0, 1))


def cast(root: Path, rank: int, mode: str) -> None:
    """Other dtypes of the same family: what MindSpore's own cast makes of the values."""
    truth = read_file(root / f"expected/rank_{rank}/net.safetensors")
    to = {"F32": ms.bfloat16, "F16": ms.float32, "BF16": ms.float16, "I32": ms.int64}
    numpy = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I32": np.int32}
    cell = cell_of({n: poison(n, t.shape, to[t.dtype]) for n, t in truth.items()})
    before = Meter.read() if mode == "cooperative" else None
    assert load(cell, root, mode) == ([], [])
    if before is not None:
        assert Meter.read().down - before.down <= 1024, "a cast went through the host"  # 512: ranks meet
    for parameter in cell.get_parameters():
        stored = truth[parameter.name]
        values = np.frombuffer(stored.data, numpy[stored.dtype]).reshape(stored.shape)
        held = ms.Tensor(values)
        held = held.view(ms.bfloat16) if stored.dtype == "BF16" else held
        assert raw(parameter) == np.ascontiguousarray(held.astype(to[stored.dtype]).asnumpy()).tobytes(), stored.dtype


def shared(root: Path, rank: int, mode: str) -> None:
    """A Parameter that another pipeline stage owns is left alone, and is not missed; the owner's is filled."""
    truth = read_file(root / f"expected/rank_{rank}/net.safetensors")
    parameters = {n: poison(n, t.shape, DTYPES[t.dtype]) for n, t in truth.items()}
    name = next(iter(truth))
    before = raw(parameters[name])
    parameters[name].param_info.is_pipeline_shared_param = rank == 1
    missing, unused = load(cell_of(parameters), root, mode)
    assert missing == []
    assert unused == ([name] if rank == 1 else [])
    for other, parameter in parameters.items():
        assert raw(parameter) == (before if (other, rank) == (name, 1) else truth[other].data), other


def verified(root: Path, rank: int, mode: str) -> None:
    """Replicas are compared as they are in the Parameters: cast, not yet sliced, of another dtype; a flip is found."""
    truth = read_file(root / f"expected/rank_{rank}/net.safetensors")
    full = json.loads((root / "shapes.json").read_text())
    to = {"F32": ms.bfloat16, "F16": ms.float32, "BF16": ms.float16, "I32": ms.int64}

    def cell(dtypes: dict[str, Any], sliced: bool) -> nn.Cell:
        shapes = {n: t.shape if sliced else tuple(full[n]) for n, t in truth.items()}
        return cell_of({n: poison(n, shapes[n], dtypes[t.dtype]) for n, t in truth.items()})

    load(cell(DTYPES, rank == 0), root, mode, verify="replicas")
    load(cell(to, rank == 0), root, mode, verify="replicas")
    load(cell(to if rank else DTYPES, True), root, mode, verify="replicas")
    real = memory.mark_loaded

    def flip(parameter: ms.Parameter) -> None:
        real(parameter)
        if parameter.name == "d.whole" and rank == 1:
            mint.narrow(parameter, 0, 1, 1).fill_(3)

    memory.mark_loaded = flip
    try:
        load(cell(to, rank == 0), root, mode, verify="replicas")
    except LoadError as error:
        assert isinstance(error.__cause__, ChecksumError)
        assert "'d.whole', region [0:4, 0:6]: rank 0 holds digest" in str(error) and "rank 1" in str(error), error
    else:
        raise AssertionError("the flip was not found")
    finally:
        memory.mark_loaded = real


def tiled(root: Path, rank: int, mode: str) -> None:
    """Slices longer than a slab go up in stretches, from two slabs: as many bytes as are wanted, all of them pinned."""
    truth = read_file(root / f"expected/rank_{rank}/net.safetensors")
    for dtypes in (DTYPES, {**DTYPES, "F32": ms.bfloat16}):
        cell = cell_of({n: poison(n, t.shape, dtypes[t.dtype]) for n, t in truth.items()})
        ms.runtime.synchronize()
        before = [acl_uploaded(True), acl_uploaded(False)]
        load(cell, root, mode, buffer_bytes=1 << 20)
        wanted = sum(len(t.data) for t in truth.values())
        assert wanted <= acl_uploaded(True) - before[0] <= wanted + 512
        assert acl_uploaded(False) == before[1]
        for parameter in cell.get_parameters():
            stored = truth[parameter.name]
            held = ms.Tensor(np.frombuffer(stored.data, np.float32).reshape(stored.shape)).astype(parameter.dtype)
            assert raw(parameter) == np.ascontiguousarray(held.asnumpy()).tobytes(), parameter.name


def measured(root: Path, rank: int) -> None:
    """What `ms-ckpt measure` finds on a device is a profile that a load takes."""
    path = root / "measured.json"
    found = measure(root / "source", path, seconds=0.6)
    assert {"storage", "reader", "link", "upload", "latency", "memory", "call"} <= found.keys()
    assert all(found[name]["bytes_per_second"] > 0 for name in ("storage", "reader", "link", "upload"))
    assert found["call"]["bytes"] == 200 * (1 << 20)
    assert (1 << 30) < found["memory"]["bytes"] < 16 * (1 << 30)
    assert profiles.profile(str(path)).hardware.upload == found["upload"]["bytes_per_second"]


def encrypted(root: Path, rank: int, mode: str) -> None:
    """Decrypted by the rank that reads it, exchanged and cut on the device: our container, and MindSpore's blocks."""
    truth = read_file(root / f"expected/rank_{rank}/net.safetensors")
    for folder, form in (("sealed", "safetensors"), ("sealed_ckpt", "ckpt")):
        cell = cell_of({n: poison(n, t.shape, DTYPES[t.dtype]) for n, t in truth.items()})
        source = {"unified_safetensors_dir": root / folder} if form == "safetensors" else {}
        load_distributed_checkpoint(
            cell, root / folder if form == "ckpt" else None, root / "predicted.ckpt", root / "trained.ckpt",
            format=form, mode=mode, bucket_bytes=BUCKET, dec_key=KEY, **source,
        )  # fmt: skip
        for parameter in cell.get_parameters():
            assert raw(parameter) == truth[parameter.name].data, (folder, parameter.name)


def main() -> None:
    root = Path(sys.argv[1])
    ms.set_device("Ascend")
    distributed.init_process_group()
    rank = distributed.get_rank()
    keep_reports()
    counted(root / "large", rank)
    tiled(root / "large", rank, "direct")
    measured(root / "large", rank)
    print("measured, and tiled, is right", flush=True)
    cases: list[Callable[[Path, int, str], None]] = [
        without_init,
        not_yet_sliced,
        placed,
        formats,
        cast,
        shared,
        verified,
        encrypted,
    ]
    for case in cases:
        for mode in ("cooperative", "direct"):
            case(root / "small", rank, mode)
            print(f"case {case.__name__} {mode} is right", flush=True)


if __name__ == "__main__":
    main()
