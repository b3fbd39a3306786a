"""Side by side with stock MindSpore in one process: the same files, the same bytes, the same answers.

Stock runs on the CPU here. Where it is defective the difference is stated, and ours is compared with the truth.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ms_ckpt_ext
from ms_ckpt_ext.engine.integrity.manifest import MANIFEST_NAME
from ms_ckpt_ext.errors import ArgumentTypeError, LayoutMismatchError, LoadError, UsageError
from tests.support.checkpoints import Stored, read_file

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
CASES = ["dp2_tp4", "dp2_tp2_pp2_zero", "dp3_tp8", "dp4_tp2_zero2"]


@pytest.mark.parametrize("case", CASES)
def test_merge(case: str, ms: Any, golden: Path, tmp_path: Path) -> None:
    source, strategy = str(golden / case / "shards"), str(golden / case / "strategy.ckpt")
    ms.unified_safetensors(source, strategy, str(tmp_path / "stock"))
    ms_ckpt_ext.unified_safetensors(source, strategy, tmp_path / "ours")
    assert (tmp_path / "ours/part0.safetensors").read_bytes() == (tmp_path / "stock/part0.safetensors").read_bytes()
    maps = [json.loads((tmp_path / who / "param_name_map.json").read_text()) for who in ("ours", "stock")]
    assert maps[0] == maps[1]
    visible = [{p.name for p in (tmp_path / w).iterdir() if p.name[0] != "."} for w in ("ours", "stock")]
    assert visible[0] - {MANIFEST_NAME} == visible[1]


def test_merge_of_what_a_training_job_saved(ms: Any, golden: Path, tmp_path: Path) -> None:
    """Scalars go to a file of their own."""
    trained = golden / "trained_dp2_tp2_zero"
    for folder in (trained / "step6").iterdir():
        (tmp_path / "source" / folder.name).mkdir(parents=True)
        shutil.copy(folder / "net.safetensors", tmp_path / "source" / folder.name)
    for who, merge in (("stock", ms.unified_safetensors), ("ours", ms_ckpt_ext.unified_safetensors)):
        merge(str(tmp_path / "source"), str(trained / "strategy" / "strategy_0.ckpt"), str(tmp_path / who))
    for name in ("part0.safetensors", "hyper_param.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # stock leaves its sources open
def test_merge_of_deduplicated_files(ms: Any, golden: Path, tmp_path: Path) -> None:
    """Stock needs to be told, ours reads the files' own flag; stock carries the flag into the result."""
    source, strategy = str(golden / "formats_dp2_tp4/dedup"), str(golden / "formats_dp2_tp4/strategy.ckpt")
    ms.unified_safetensors(source, strategy, str(tmp_path / "stock"), merge_with_redundancy=False)
    ms_ckpt_ext.unified_safetensors(source, strategy, tmp_path / "ours")
    for name in ("part0.safetensors", "hyper_param.safetensors"):
        assert read_file(tmp_path / "ours" / name) == read_file(tmp_path / "stock" / name)


def test_choice_func_filters_and_renames_alike(ms: Any, golden: Path, tmp_path: Path) -> None:
    """Stock also writes rank 0's slice of a dropped parameter to hyper_param.safetensors (defect); ours does not."""

    def choice(name: str) -> Any:
        return not name.startswith("adam") and (f"model.{name}" if "norm" in name else True)

    source, strategy = str(golden / "dp2_tp4/shards"), str(golden / "dp2_tp4/strategy.ckpt")
    ms.unified_safetensors(source, strategy, str(tmp_path / "stock"), choice_func=choice)
    ms_ckpt_ext.unified_safetensors(source, strategy, tmp_path / "ours", choice_func=choice)
    assert read_file(tmp_path / "ours/part0.safetensors") == read_file(tmp_path / "stock/part0.safetensors")
    assert (tmp_path / "stock/hyper_param.safetensors").exists()
    assert not (tmp_path / "ours/hyper_param.safetensors").exists()


@pytest.mark.parametrize("case", CASES)
def test_save_mode(case: str, ms: Any, golden: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    shutil.copy(golden / "full" / "model.safetensors", merged / "part0.safetensors")
    for rank in (0, 7):
        for who, package in (("stock", ms), ("ours", ms_ckpt_ext)):
            load = package.load_distributed_checkpoint
            target = {"dst_safetensors_dir": str(tmp_path / who), "unified_safetensors_dir": str(merged)}
            load(None, None, str(golden / case / "strategy.ckpt"), format="safetensors", rank_id=rank, **target)
        name = f"rank_{rank}/net.safetensors"
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()


DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "I64": "int64", "BOOL": "bool_"}


class Pair:
    """The same network twice, loaded by stock and by us from one merged directory."""

    def __init__(self, ms: Any, source: Path, parameters: dict[str, tuple[tuple[int, ...], str]]) -> None:
        self.ms, self.source = ms, source
        self.networks = {who: self._network(parameters) for who in ("stock", "ours")}

    def _network(self, parameters: dict[str, tuple[tuple[int, ...], str]]) -> Any:
        cell = self.ms.nn.Cell()
        for number, (name, (shape, dtype)) in enumerate(parameters.items()):
            poison = self.ms.Tensor(np.ones(shape), getattr(self.ms, dtype))
            cell.insert_param_to_cell(f"p{number}", self.ms.Parameter(poison, name=name), False)
        return cell

    def load(self, **more: Any) -> dict[str, Any]:
        answers = {}
        loaders = {"stock": self.ms.load_distributed_checkpoint, "ours": ms_ckpt_ext.load_distributed_checkpoint}
        for who, load in loaders.items():
            arguments = {"format": "safetensors", "unified_safetensors_dir": str(self.source), **more}
            answers[who] = load(self.networks[who], **arguments)
        return answers

    def contents(self, who: str) -> dict[str, tuple[str, bytes]]:
        return {p.name: (str(p.dtype), p.asnumpy().tobytes()) for p in self.networks[who].get_parameters()}


@pytest.fixture
def merged(golden: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    ms_ckpt_ext.unified_safetensors(
        golden / "formats_dp2_tp4/safetensors", golden / "formats_dp2_tp4/strategy.ckpt", folder
    )
    return folder


def held(merged: Path) -> dict[str, Stored]:
    return {**read_file(merged / "part0.safetensors"), **read_file(merged / "hyper_param.safetensors")}


def test_a_network_gets_the_same(ms: Any, merged: Path) -> None:
    """All there is, less some, plus some; answers in the same words."""
    parameters = {n: (t.shape, DTYPES[t.dtype]) for n, t in held(merged).items() if "layers.1" not in n}
    pair = Pair(ms, merged, {**parameters, "unknown.weight": ((2, 3), "float32"), "accu_grads.x": ((2,), "float32")})
    answers = pair.load()
    assert answers["ours"][0] == answers["stock"][0] == ["unknown.weight"]
    assert sorted(answers["ours"][1]) == sorted(answers["stock"][1])
    assert len(answers["ours"][1]) == 18
    assert pair.contents("ours") == pair.contents("stock")
    assert pair.contents("ours")["global_step"][1] == held(merged)["global_step"].data


@pytest.mark.parametrize("target", ["dp2_tp4", "dp3_tp8", "dp4_tp2_zero2"])
def test_a_strategy_cuts_the_same(target: str, ms: Any, merged: Path, golden: Path) -> None:
    shard = read_file(golden / target / "shards/rank_0/net.safetensors")
    pair = Pair(ms, merged, {name: (t.shape, DTYPES[t.dtype]) for name, t in shard.items()})
    answers = pair.load(predict_strategy=str(golden / target / "strategy.ckpt"))
    assert answers["ours"][0] == answers["stock"][0] == []
    assert sorted(answers["ours"][1]) == sorted(answers["stock"][1])
    assert pair.contents("ours") == pair.contents("stock")
    assert {name: data for name, (_, data) in pair.contents("ours").items()} == {n: t.data for n, t in shard.items()}


@pytest.mark.parametrize(
    "casts",
    [
        {"layers.0.norm": "float16", "head.weight": "bfloat16", "layers.0.w2.weight": "float64"},
        {"layers.0.w1.weight": "float32", "layers.1.w1.weight": "float16", "layers.0.wqkv.bias": "bfloat16"},
        {"global_step": "int64", "epoch_num": "int32", "step_num": "int16"},
    ],
)
def test_casts_give_the_same_bytes(casts: dict[str, str], ms: Any, merged: Path) -> None:
    tensors = held(merged)
    pair = Pair(ms, merged, {name: (tensors[name].shape, dtype) for name, dtype in casts.items()})
    pair.load()
    assert pair.contents("ours") == pair.contents("stock")


def test_names_behind_a_prefix_and_name_map(ms: Any, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    full = {f"backbone.{name}": np.arange(6, dtype=np.float32) + n for n, name in enumerate(["a.w", "b.w"])}
    full["old.c"] = np.ones(3, np.float32)
    save_file(full, tmp_path / "x.safetensors")
    pair = Pair(ms, tmp_path, {"a.w": ((6,), "float32"), "b.w": ((6,), "float32"), "c": ((3,), "float32")})
    answers = pair.load(name_map={"c": "old.c"})
    assert answers["ours"][0] == answers["stock"][0] == []
    assert pair.contents("ours") == pair.contents("stock")
    assert pair.contents("ours")["b.w"][1] == full["backbone.b.w"].tobytes()


def test_a_parameter_dict(ms: Any, merged: Path) -> None:
    pair = Pair(ms, merged, {"layers.0.norm": ((24,), "float32")})
    answers = pair.load(return_param_dict=True)
    told = {who: {n: (str(p.dtype), p.asnumpy().tobytes()) for n, p in a.items()} for who, a in answers.items()}
    assert told["ours"] == told["stock"]
    assert len(told["ours"]) == 49
    assert pair.contents("ours")["layers.0.norm"][1] == np.ones(24, np.float32).tobytes()


def test_parameters_that_were_never_initialised(ms: Any, merged: Path) -> None:
    from mindspore.nn.utils import no_init_parameters

    class Network(ms.nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            init = ms.common.initializer.initializer
            self.norm = ms.Parameter(init("normal", (24,), ms.float32), name="layers.0.norm")

    with no_init_parameters():
        network = Network()
    answer = ms_ckpt_ext.load_distributed_checkpoint(
        network, format="safetensors", unified_safetensors_dir=merged, mode="direct"
    )
    assert answer[0] == []
    assert network.norm.asnumpy().tobytes() == held(merged)["layers.0.norm"].data


@pytest.mark.parametrize("mode", ["direct", "cooperative"])
def test_a_parameter_that_is_not_sliced_yet_takes_its_slice(mode: str, ms: Any, merged: Path, golden: Path) -> None:
    shard = read_file(golden / "tp4/shards/rank_0/net.safetensors")["head.weight"]
    network = ms.nn.Cell()
    network.insert_param_to_cell("w", ms.Parameter(ms.Tensor(np.ones((96, 24)), ms.float32), name="head.weight"))
    ms_ckpt_ext.load_distributed_checkpoint(
        network, None, golden / "tp4/strategy.ckpt", format="safetensors", unified_safetensors_dir=merged, mode=mode
    )
    assert network.w.shape == (24, 24)
    assert network.w.asnumpy().tobytes() == shard.data


BAD = {
    "shape": ({"layers.0.norm": ((25,), "float32")}, {}, LayoutMismatchError, "has shape [25] in the network"),
    "family": ({"layers.0.norm": ((24,), "int32")}, {}, LayoutMismatchError, "within floats and within ints only"),
    "strict": (
        {"layers.0.norm": ((24,), "float16")}, {"strict_load": True}, LayoutMismatchError, "strict_load forbids a cast",
    ),
    "mode": ({"layers.0.norm": ((24,), "float32")}, {"mode": "fast"}, UsageError, "mode must be one of auto, direct"),
    "verify": ({"layers.0.norm": ((24,), "float32")}, {"verify": "yes"}, UsageError, "verify must be one of none"),
    "name_map": ({"layers.0.norm": ((24,), "float32")}, {"name_map": {"a": 1}}, ArgumentTypeError, "name_map must map"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("mode", ["direct", "cooperative"])
def test_what_does_not_fit_changes_nothing(mode: str, name: str, ms: Any, merged: Path) -> None:
    parameters, more, kind, message = BAD[name]
    pair = Pair(ms, merged, {"head.weight": ((96, 24), "float32"), **parameters})
    before = pair.contents("ours")
    arguments = {"format": "safetensors", "unified_safetensors_dir": merged, "mode": mode, **more}
    with pytest.raises(kind) as caught:
        ms_ckpt_ext.load_distributed_checkpoint(pair.networks["ours"], **arguments)
    assert message in str(caught.value)
    assert pair.contents("ours") == before


@pytest.mark.parametrize("mode", ["direct", "cooperative"])
def test_a_read_that_fails_on_the_way_names_what_may_have_changed(
    mode: str, ms: Any, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def refuse(fd: int, buffers: Any, offset: int) -> int:
        if offset > 8:  # behind the header, which is read at 8
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    network = Pair(ms, merged, {"head.weight": ((96, 24), "float32")}).networks["ours"]
    with pytest.raises(LoadError, match="Input/output error") as caught:
        ms_ckpt_ext.load_distributed_checkpoint(
            network, format="safetensors", unified_safetensors_dir=merged, mode=mode
        )
    assert caught.value.changed == ("head.weight",)


def test_no_network_at_all(ms: Any, merged: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="network must be a mindspore.nn.Cell or None, got dict"):
        ms_ckpt_ext.load_distributed_checkpoint({}, format="safetensors", unified_safetensors_dir=merged, mode="direct")


def test_packed_int4_keeps_its_mark(ms: Any, tmp_path: Path) -> None:
    """MindSpore stores packed int4 as int8 and says so in the metadata: through merge, re-cut and load."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    from ms_ckpt_ext.core.geometry.layout import Layout
    from tests.support.checkpoints import strategy_of

    packed = np.arange(-32, 32, dtype=np.int8).reshape(8, 8)
    strategy_of({"q.weight": Layout((2,), ((0,), ()))}, tmp_path / "s.ckpt")
    for rank in range(2):
        (tmp_path / f"src/rank_{rank}").mkdir(parents=True)
        half = np.ascontiguousarray(packed[4 * rank : 4 * rank + 4])
        note = {"format": "ms", "q.weight": "Int4"}
        save_file({"q.weight": half}, tmp_path / f"src/rank_{rank}/net.safetensors", note)
    ms_ckpt_ext.unified_safetensors(
        tmp_path / "src", tmp_path / "s.ckpt", tmp_path / "out", choice_func=lambda name: f"model.{name}"
    )
    with safe_open(tmp_path / "out/part0.safetensors", "np") as file:
        assert file.metadata() == {"format": "ms", "model.q.weight": "Int4"}
        assert file.get_tensor("model.q.weight").tobytes() == packed.tobytes()
    network = ms.nn.Cell()
    weight = ms.Parameter(ms.Tensor(np.zeros((8, 8), np.int8), dtype=ms.qint4x2), name="model.q.weight")
    network.insert_param_to_cell("w", weight)
    ms_ckpt_ext.load_distributed_checkpoint(
        network, format="safetensors", unified_safetensors_dir=tmp_path / "out", mode="direct"
    )
    assert network.w.dtype == ms.qint4x2
    assert network.w.asnumpy().tobytes() == packed.tobytes()
