"""Cooperative loads from every format and container, the ranks as threads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ms_ckpt_ext.engine.integrity.authenticate import prove_chunks
from ms_ckpt_ext.engine.source.catalog import catalog_of
from ms_ckpt_ext.engine.source.listing import list_checkpoint
from ms_ckpt_ext.engine.unlisted.alike import compared
from ms_ckpt_ext.errors import CheckpointError, DecryptionError, PeerError
from ms_ckpt_ext.formats.crypto import Key
from ms_ckpt_ext.formats.registry import Access, read_indexes
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.formats import KEY, KINDS, WRONG, key_of, make_source, scalars_of
from tests.support.loads import Load, assert_shards, needed_once

CASE = "formats_dp2_tp4"


def load_of(golden: Path, kind: str, root: Path, **options: object) -> Load:
    strategy = load_strategy(golden / CASE / "strategy.ckpt")
    target = load_strategy(golden / "dp2_tp2/strategy.ckpt")
    load = Load(make_source(golden, CASE, kind, root), strategy, target, **options)
    told = key_of(kind)
    load.access = Access(Key(KEY), str(told["dec_mode"])) if told else load.access
    return load


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_right_and_read_once(kind: str, golden: Path, tmp_path: Path) -> None:
    loaded = load_of(golden, kind, tmp_path / "src").run()
    scalars = {name: tensor.data for name, tensor in scalars_of(golden, CASE, kind).items()}
    assert_shards(loaded, golden / "dp2_tp2/shards", scalars)
    assert sum(rank.report.reads.nbytes for rank in loaded) == needed_once(loaded)


def test_small_buckets(golden: Path, tmp_path: Path) -> None:
    loaded = load_of(golden, "ckpt_aes_gcm", tmp_path / "src", bucket_bytes=16384).run()
    assert_shards(
        loaded, golden / "dp2_tp2/shards", {n: t.data for n, t in scalars_of(golden, CASE).items()}
    )  # fmt: skip
    assert loaded[0].report.rounds > 5


def test_a_wrong_key_is_told_to_all(golden: Path, tmp_path: Path) -> None:
    load = load_of(golden, "safetensors_chunked", tmp_path / "src")
    load.access = Access(Key(WRONG))
    errors = load.fail().values()
    assert any(isinstance(error, DecryptionError) for error in errors)
    for error in errors:
        assert isinstance(error, (DecryptionError, PeerError)) and "the key is wrong" in str(error)
        assert "0123456789" not in str(error)


@pytest.mark.parametrize("kind", ["ckpt_aes_gcm", "safetensors_chunked"])
def test_an_altered_chunk_is_found_by_the_rank_that_reads_it(kind: str, golden: Path, tmp_path: Path) -> None:
    """The headers are right; the proof before the first round sees the rest."""
    source = make_source(golden, CASE, kind, tmp_path / "src")
    load = load_of(golden, kind, tmp_path / "again")
    load.source = source
    plan = load.run()[0].plan
    for rank in range(8):
        (file,) = (source / f"rank_{rank}").iterdir()
        data = bytearray(file.read_bytes())
        data[-30] ^= 1  # in the last chunk
        (tmp_path / "bad" / f"rank_{rank}").mkdir(parents=True)
        (tmp_path / "bad" / f"rank_{rank}" / file.name).write_bytes(data)
    listing = list_checkpoint(str(tmp_path / "bad"), load.trained)
    if kind == "ckpt_aes_gcm":  # a .ckpt's table of contents is all over the file
        with pytest.raises(DecryptionError, match="the key is wrong, or the file was altered"):
            read_indexes(listing.files.values(), load.access)
        return
    indexes = dict(zip(listing.files, read_indexes(listing.files.values(), load.access)))
    catalog = compared(catalog_of(indexes, listing.sharded, listing.names, load.trained, load.access))
    found: list[CheckpointError] = []
    for rank in range(4):
        try:
            prove_chunks(plan, rank, catalog, 2)
        except CheckpointError as error:
            found.append(error)
    assert found and all("was altered, moved or taken from another file" in str(error) for error in found)
    shutil.rmtree(tmp_path / "bad")
