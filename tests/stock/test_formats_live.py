"""Live loads of every format in this process: beside stock MindSpore, and as each rank of a target strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.source.catalog import Catalog, open_catalog
from ms_ckpt_ext.errors import CheckpointError, ChecksumError, DecryptionError, LoadError
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.registry import Access
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.checkpoints import read_file, shard
from tests.support.formats import KEY, KINDS, WRONG, format_of, key_of, make_source, scalars_of
from tests.support.parameters import bytes_of, poisoned

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
CASE = "formats_dp2_tp4"


def opened(golden: Path, kind: str, source: Path) -> tuple[Catalog, Strategy]:
    told = key_of(kind)
    access = Access(Key(KEY), str(told["dec_mode"])) if told else Access()
    catalog = open_catalog(str(source), load_strategy(golden / CASE / "strategy.ckpt"), access=access)
    return catalog, load_strategy(golden / "dp2_tp2/strategy.ckpt")


@pytest.mark.parametrize("kind", KINDS)
def test_direct(kind: str, ms: Any, golden: Path, tmp_path: Path) -> None:
    from ms_ckpt_ext.bridge.network import fill
    from ms_ckpt_ext.bridge.request import LoadRequest
    from ms_ckpt_ext.bridge.settle import Manner

    manner = Manner(strict=False, exact=False)
    catalog, target = opened(golden, kind, make_source(golden, CASE, kind, tmp_path / "src"))
    for rank in range(4):
        expected = read_file(shard(golden / "dp2_tp2/shards" / f"rank_{rank}")) | scalars_of(golden, CASE, kind)
        cell = poisoned(expected)
        found = fill(LoadRequest(cell, target, rank, manner, workers=2), catalog)
        assert (found.missing, found.unused) == ([], [])
        assert bytes_of(cell) == {name: tensor.data for name, tensor in expected.items()}


@pytest.mark.parametrize("mode", ["direct", "cooperative", "auto"])
@pytest.mark.parametrize("kind", ["ckpt", "ckpt_aes_gcm", "safetensors_chunked"])
def test_the_public_function(kind: str, mode: str, ms: Any, golden: Path, tmp_path: Path) -> None:
    source = make_source(golden, CASE, kind, tmp_path / "src")
    expected = read_file(golden / "full/model.safetensors") | scalars_of(golden, CASE)
    cell = poisoned(expected)
    arguments = {"format": format_of(kind), "unified_safetensors_dir": source, "mode": mode, **key_of(kind)}
    answer = ms_ckpt_ext.load_distributed_checkpoint(cell, None, None, golden / CASE / "strategy.ckpt", **arguments)
    assert answer == ([], [])
    assert bytes_of(cell) == {name: tensor.data for name, tensor in expected.items()}


@pytest.mark.parametrize("kind", ["ckpt", "ckpt_crc", "ckpt_aes_gcm", "ckpt_aes_cbc", "ckpt_sm4_cbc"])
def test_beside_stock(kind: str, ms: Any, golden: Path, tmp_path: Path) -> None:
    """The same call. Stock loads BFloat16 as Float32 on the way and loses the payload of NaNs, so ours is the truth."""
    source = make_source(golden, CASE, kind, tmp_path / "src")
    names = [str(next((source / f"rank_{rank}").iterdir())) for rank in range(8)]
    expected = read_file(golden / "full/model.safetensors")
    cells = {who: poisoned(expected) for who in ("stock", "ours")}
    answers = {}
    for who, package in (("stock", ms), ("ours", ms_ckpt_ext)):
        answers[who] = package.load_distributed_checkpoint(
            cells[who], names, None, str(golden / CASE / "strategy.ckpt"), **key_of(kind)
        )
    assert bool(answers["ours"]) is bool(answers["stock"]) is True
    ours, stock = bytes_of(cells["ours"]), bytes_of(cells["stock"])
    assert ours == {name: tensor.data for name, tensor in expected.items()}
    same = [name for name, tensor in expected.items() if tensor.dtype != "BF16"]
    assert {name: stock[name] for name in same} == {name: ours[name] for name in same}


def test_a_parameter_dict(ms: Any, golden: Path) -> None:
    """As `mindspore.load_checkpoint` has it, dtypes and shapes included."""
    source = golden / CASE / "ckpt"
    file = next((source / "rank_0").iterdir())
    theirs = ms.load_checkpoint(str(file))
    found = ms_ckpt_ext.load_distributed_checkpoint(
        ms.nn.Cell(), [str(file)], None, None, return_param_dict=True
    )  # fmt: skip
    assert sorted(found) == sorted(theirs)
    for name, parameter in theirs.items():
        mine = found[name]
        assert (mine.dtype, mine.shape) == (parameter.dtype, parameter.shape)
        assert mine.asnumpy().tobytes() == parameter.asnumpy().tobytes()


class Damage:
    """A chunked source with one file spoilt after its headers."""

    def __init__(self, golden: Path, kind: str, root: Path) -> None:
        self.golden, self.kind = golden, kind
        self.source = make_source(golden, CASE, kind, root)
        self.files = [next((self.source / f"rank_{rank}").iterdir()) for rank in range(8)]
        for file in self.files:
            file.chmod(0o644)

    def swap_chunks(self) -> None:
        step = 1024 + 16
        for file in self.files:
            data = file.read_bytes()
            a, b = (slice(96 + n * step, 96 + (n + 1) * step) for n in (20, 21))
            spoilt = bytearray(data)
            spoilt[a], spoilt[b] = data[b], data[a]
            file.write_bytes(spoilt)

    def alter(self) -> None:
        for file in self.files:
            spoilt = bytearray(file.read_bytes())
            spoilt[-30] ^= 1
            file.write_bytes(spoilt)

    def truncate(self) -> None:
        for file in self.files:
            file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("mode", ["direct", "cooperative"])
@pytest.mark.parametrize("damage", ["swap_chunks", "alter", "truncate", "wrong key"])
@pytest.mark.parametrize("kind", ["ckpt_chunked", "safetensors_chunked", "ckpt_aes_gcm"])
def test_damage_is_found_before_a_parameter_changes(
    kind: str, damage: str, mode: str, ms: Any, golden: Path, tmp_path: Path
) -> None:
    if (kind, damage) == ("ckpt_aes_gcm", "swap_chunks"):
        pytest.skip("MindSpore's blocks are not bound to their place, see docs/encryption.md")
    case = Damage(golden, kind, tmp_path / "src")
    if damage != "wrong key":
        getattr(case, damage)()
    cell = poisoned(read_file(golden / "full/model.safetensors"))
    before = bytes_of(cell)
    told = {**key_of(kind), "dec_key": WRONG if damage == "wrong key" else KEY}
    with pytest.raises(CheckpointError) as caught:
        ms_ckpt_ext.load_distributed_checkpoint(
            cell, None, None, golden / CASE / "strategy.ckpt", format=format_of(kind), mode=mode,
            unified_safetensors_dir=case.source, **told,
        )  # fmt: skip
    assert not isinstance(caught.value, LoadError)
    assert str(case.source) in str(caught.value) and "0123456789" not in str(caught.value)
    assert damage == "truncate" or isinstance(caught.value, DecryptionError)
    assert bytes_of(cell) == before


def test_a_checksum_is_verified_before_a_parameter_changes(ms: Any, golden: Path, tmp_path: Path) -> None:
    case = golden / CASE
    (tmp_path / "src/rank_0").mkdir(parents=True)
    data = bytearray(next((case / "ckpt_crc/rank_0").iterdir()).read_bytes())
    data[-40] ^= 1
    file = tmp_path / "src/rank_0/net.ckpt"
    file.write_bytes(data)
    cell = poisoned(scalars_of(golden, CASE))
    before = bytes_of(cell)
    with pytest.raises(ChecksumError):
        ms_ckpt_ext.load_distributed_checkpoint(cell, [str(file)], mode="direct", crc_check=True)
    assert bytes_of(cell) == before
