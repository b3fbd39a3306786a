"""How often a load meets, and how often it reads the header of a file: once each, whichever way it was called."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple

import numpy as np
import pytest

from ms_ckpt_ext import load_distributed_checkpoint, load_for_inference, resume
from ms_ckpt_ext.bridge.mindformers import loader
from ms_ckpt_ext.bridge.mindformers.options import Options
from ms_ckpt_ext.transport.local import LocalTransport
from ms_ckpt_ext.transport.select import lent
from tests.support.cells import HERE, Filled, cell, on_ranks, threads
from tests.support.machine import ReadMade, watch_reads
from tests.support.mindformers_folder import WHOLE
from tests.support.mindformers_folder import saved as saved_by_mindformers
from tests.support.parameters import held_by
from tests.support.saved import RANKS, save

__all__ = ["threads"]
pytestmark = pytest.mark.usefixtures("threads")
BEHIND_LENGTH = 8
"""Where the header of a safetensors file begins; contents never do."""


class Seen(NamedTuple):
    """Meetings that every rank has left, and all reads of files."""

    meetings: Counter[int]
    reads: list[ReadMade]

    @property
    def headers(self) -> Counter[str]:
        """Path -> times that the file's header was read, by any rank."""
        return Counter(read.path for read in self.reads if read.offset == BEHIND_LENGTH)


class Counted(LocalTransport):
    """A rank's transport, which counts how often it is left."""

    def __init__(self, transport: LocalTransport, left: Counter[int]) -> None:
        self.__dict__ = {**transport.__dict__, "left": left}

    def close(self) -> None:
        self.left[self.rank] += 1


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, threads: None) -> Seen:
    return Seen(Counter(), watch_reads(monkeypatch))


def loaded(seen: Seen, shapes: Any, call: Callable[[Any], Any]) -> None:
    """`call` fills a network of these Parameters on every rank."""

    def work(transport: LocalTransport) -> Filled:
        made = cell(shapes)
        with lent(Counted(transport, seen.meetings)):
            call(made)
        return Filled(held_by(made), [], [], None, None)

    for filled in on_ranks(RANKS, work):
        for name, array in shapes.items():
            assert filled.held[name].tobytes() == array.tobytes()


def kept(root: Path) -> dict[str, np.ndarray]:
    """Parameters of the checkpoints that every rank's file holds whole."""
    from safetensors.numpy import load_file

    files = sorted(root.glob("rank_*/net-1_10.safetensors"))
    held = [load_file(file) for file in files]
    return {n: a for n, a in held[0].items() if all(np.array_equal(a, other[n]) for other in held if n in other)}


def once(root: Path, pattern: str) -> Counter[str]:
    return Counter(str(path) for path in root.glob(pattern))


@pytest.mark.parametrize("function", [resume, load_for_inference])
@pytest.mark.parametrize("options", [{}, {"mode": "direct"}, {"mode": "cooperative", "check": "digests"}])
def test_a_resume_meets_once_and_reads_every_header_once(
    tmp_path: Path, seen: Seen, function: Any, options: dict[str, Any]
) -> None:
    save(tmp_path / "c", 10)
    save(tmp_path / "c", 20)
    torn = tmp_path / "c/rank_2/net-1_20.safetensors"
    torn.write_bytes(torn.read_bytes()[:64].ljust(torn.stat().st_size, b"\0"))
    step = kept(tmp_path / "c")["global_step"]
    seen.reads.clear()
    loaded(
        seen, {"global_step": step}, lambda made: function(made, checkpoint_dir=tmp_path / "c", timeout=20.0, **options)
    )
    assert seen.meetings == dict.fromkeys(range(RANKS), 1)
    assert seen.headers == once(tmp_path, "c/rank_*/net-1_*.safetensors"), "those of the torn save, and of the older"


@pytest.mark.parametrize("options", [{}, {"mode": "cooperative", "verify": "full"}, {"verify": "replicas"}])
def test_a_load_by_all_ranks_meets_once_and_reads_every_header_once(
    tmp_path: Path, seen: Seen, options: dict[str, Any]
) -> None:
    save(tmp_path / "c", 10)
    step = {"global_step": kept(tmp_path / "c")["global_step"]}
    where = {"unified_safetensors_dir": tmp_path / "c", "train_strategy_filename": tmp_path / "made_10/strategy.ckpt"}
    seen.reads.clear()
    loaded(seen, step, lambda made: load_distributed_checkpoint(made, format="safetensors", **where, **options))
    assert seen.meetings == dict.fromkeys(range(RANKS), 1)
    assert seen.headers == once(tmp_path, "c/rank_*/*.safetensors")


def test_a_load_by_each_rank_alone_meets_nobody_and_reads_every_header_once_a_rank(tmp_path: Path, seen: Seen) -> None:
    save(tmp_path / "c", 10)
    step = {"global_step": kept(tmp_path / "c")["global_step"]}
    where = {"unified_safetensors_dir": tmp_path / "c", "train_strategy_filename": tmp_path / "made_10/strategy.ckpt"}
    seen.reads.clear()
    loaded(seen, step, lambda made: load_distributed_checkpoint(made, format="safetensors", mode="direct", **where))
    assert not seen.meetings
    assert seen.headers == dict.fromkeys(once(tmp_path, "c/rank_*/*.safetensors"), RANKS)


@pytest.mark.parametrize("mode", ["auto", "cooperative", "direct"])
def test_mindformers_loader_meets_once_and_reads_every_header_once(
    tmp_path: Path, seen: Seen, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_by_mindformers(tmp_path)
    whole = {name: SimpleNamespace(layout=None, global_shape=array.shape) for name, array in WHOLE.items()}
    checkpoint = SimpleNamespace(
        check_the_param_for_load_ckpt=lambda *_: None, get_checkpoint_path=str, load_hf_checkpoint=None
    )
    sharded = SimpleNamespace(get_cur_sharded_tensor=lambda *_: whole)
    tools = SimpleNamespace(get_real_group_size=lambda: HERE.transport.size, get_real_rank=lambda: HERE.transport.rank)
    here = SimpleNamespace(checkpoint=checkpoint, sharded_tensor=sharded)
    modules = {"mindformers": here, "mindformers.checkpoint": here, "mindformers.tools": tools}
    modules.update({"mindformers.checkpoint.checkpoint": checkpoint, "mindformers.tools.utils": tools})
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    options = Options(mode=mode)
    loaded(seen, WHOLE, lambda made: loader.load_checkpoint(lambda: pytest.fail("stock"), options, str(folder), made))
    alone = mode == "direct"
    assert seen.meetings == ({} if alone else dict.fromkeys(range(RANKS), 1))
    files = {str(path) for path in folder.glob("*.safetensors")}
    assert seen.headers == dict.fromkeys(files, RANKS if alone else 1)
