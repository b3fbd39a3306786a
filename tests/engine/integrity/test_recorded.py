"""`verify="full"`: stored tensors are compared with the digests on record before anything changes; ranks as threads."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Optional

import pytest

from ms_ckpt_ext.core.exchange.demand import Sees
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.weight_rules import Rename, Transpose
from ms_ckpt_ext.engine.integrity import recorded as audit_module
from ms_ckpt_ext.engine.integrity.digests import digest_file
from ms_ckpt_ext.engine.integrity.manifest import MANIFEST_NAME, Manifest, write_manifest
from ms_ckpt_ext.engine.integrity.recorded import audit, settled
from ms_ckpt_ext.engine.source.catalog import Catalog, open_catalog
from ms_ckpt_ext.errors import CheckpointError, ChecksumError, PeerError, StorageError, UsageError
from ms_ckpt_ext.formats.registry import read_index
from ms_ckpt_ext.formats.strategies.file import load_strategy
from ms_ckpt_ext.transport.local import LocalWorld
from tests.support.machine import ReadMade

RANKS = 4


def recorded(golden: Path, root: Path) -> Path:
    """Golden shards with a manifest above them."""
    shutil.copytree(golden / "dp2_tp4" / "shards", root)
    files = {f"rank_{rank}/net.safetensors": root / f"rank_{rank}/net.safetensors" for rank in range(8)}
    write_manifest(str(root), Manifest({name: digest_file(read_index(str(path))) for name, path in files.items()}))
    return root


def catalog_in(root: Path, golden: Path) -> Catalog:
    return open_catalog(str(root), load_strategy(golden / "dp2_tp4/strategy.ckpt"))


def flip(catalog: Catalog, file: int, name: str) -> None:
    """As a faulty disk does: nothing else shows that the file changed."""
    index = catalog.files[file]
    with open(index.path, "r+b") as shard:
        shard.seek(index.tensors[name].extents[0].offset + 5)
        byte = shard.read(1)[0]
        shard.seek(-1, 1)
        shard.write(bytes([byte ^ 16]))
    as_old_as_its_header(catalog, file)


def as_old_as_its_header(catalog: Catalog, file: int) -> None:
    index = catalog.files[file]
    os.utime(index.path, ns=(index.mtime_ns, index.mtime_ns))


def run(catalog: Catalog, sees: Optional[Sees] = None) -> dict[int, BaseException]:
    """Audit everything on all ranks; the errors by rank."""
    world = LocalWorld(RANKS, timeout=20.0)
    wanted = [*catalog.tensors.values(), *catalog.extras.values()]
    try:
        world.run(lambda transport: audit(transport, catalog, wanted, sees, 2))
    except CheckpointError:
        assert sorted(world.errors) == list(range(RANKS))
    return world.errors


def looked(reads: list[ReadMade], catalog: Catalog) -> Counter[tuple[str, str]]:
    """(file, tensor) -> times that its first byte was read."""
    begins = {
        (index.path, entry.extents[0].offset): name
        for index in catalog.files
        for name, entry in index.tensors.items()
        if entry.nbytes
    }
    return Counter(
        (path, name)
        for (path, offset), name in begins.items()
        for read in reads
        if read.path == path and read.offset <= offset < read.offset + read.nbytes
    )


def test_every_slice_is_digested_once_in_one_file(golden: Path, tmp_path: Path, reads: list[ReadMade]) -> None:
    """Replicas are not read: the load will not read them either."""
    catalog = settled(catalog_in(recorded(golden, tmp_path / "src"), golden))
    wanted = [*catalog.tensors.values(), *catalog.extras.values()]
    shares = audit_module._deal(audit_module._pairs(wanted), catalog, None, RANKS)
    dealt = Counter(
        (catalog.files[file].path, name)
        for share in shares
        for file, names in share.items()
        for name in names
        if name is not None
    )
    reads.clear()
    assert run(catalog) == {}
    read_of = looked(reads, catalog)
    assert set(dealt.values()) == {1} == set(read_of.values()) and dealt.keys() <= read_of.keys()
    slices = sum(len(t.placements[0].holders) for t in catalog.tensors.values())
    assert len(dealt) == slices < sum(len(index.tensors) for index in catalog.files)
    assert len(read_of) <= 1.02 * slices  # a gap may be read over
    read = Counter(dict.fromkeys({index.path for index in catalog.files}, 0))
    for path, name in read_of:
        read[path] += read_index(path).tensors[name].nbytes
    assert max(read.values()) <= 1.3 * min(read.values())


def test_a_flipped_byte(golden: Path, tmp_path: Path) -> None:
    catalog = settled(catalog_in(recorded(golden, tmp_path / "src"), golden))
    name = "layers.1.w2.weight"
    (file,) = catalog.tensors[name].placements[0].holders[0, 2]
    flip(catalog, file, name)
    errors = run(catalog)
    assert {type(error) for error in errors.values()} == {ChecksumError}
    assert len({str(error) for error in errors.values()}) == 1
    path = Path(catalog.files[file].path)
    before = digest_file(read_index(str(golden / "dp2_tp4/shards" / path.parent.name / path.name))).tensors[name]
    after = digest_file(read_index(str(path))).tensors[name]
    told = f"parameter {name!r} in {str(path)!r}: found {after}, the manifest says {before}"
    assert told in str(errors[0])


def test_a_shape_that_was_altered(golden: Path, tmp_path: Path) -> None:
    """Of the same tensor's bytes: only the digest of the framing tells. Each file's is compared once."""
    root = recorded(golden, tmp_path / "src")
    catalog = catalog_in(root, golden)
    victim = root / "rank_3/net.safetensors"
    raw = victim.read_bytes()
    victim.write_bytes(raw.replace(b'"shape":[', b'"shape" [', 1))
    as_old_as_its_header(catalog, 3)
    errors = run(catalog)
    assert {type(error) for error in errors.values()} == {ChecksumError}
    assert str(errors[0]).count("found names, dtypes, shapes and notes") == 1 and "rank_3" in str(errors[0])


def test_a_name_that_was_altered(golden: Path, tmp_path: Path) -> None:
    """It is not recorded because the file is not the one recorded: a fault, not a lack of digests."""
    root = recorded(golden, tmp_path / "src")
    for victim in root.rglob("*.safetensors"):
        victim.write_bytes(victim.read_bytes().replace(b'"head.weight"', b'"held.weight"', 1))
    strategy = load_strategy(golden / "dp2_tp4/strategy.ckpt")
    named = {("held.weight" if n == "head.weight" else n): layouts for n, layouts in strategy.layouts.items()}
    catalog = open_catalog(str(root), strategy._replace(layouts=named))
    (fault,) = audit_module._found(catalog, {0: ["held.weight"]}, 1)
    told = "found a tensor of this name, the manifest says no such tensor"
    assert fault.tensor == "held.weight" and str(fault).endswith(told)
    assert {type(error) for error in run(catalog).values()} == {ChecksumError}


def test_framing_goes_to_who_reads_the_file(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = settled(catalog_in(recorded(golden, tmp_path / "src"), golden))
    wanted = audit_module._pairs(catalog.tensors.values())
    shares = audit_module._deal(wanted, catalog, None, RANKS)
    framing = [(rank, file) for rank, share in enumerate(shares) for file, names in share.items() if None in names]
    assert sorted(file for _, file in framing) == sorted({file for file, _ in wanted})
    assert len({rank for rank, _ in framing}) > 1
    for rank, file in framing:
        assert len(shares[rank][file]) > 1
    looked: list[str] = []
    real = os.open

    def counted(path: Any, *mode: Any) -> Any:
        looked.append(str(path))
        return real(path, *mode)

    monkeypatch.setattr(os, "open", counted)
    audit_module.audit_alone(catalog, catalog.tensors.values(), 1)
    found = [path for path in looked if path.endswith(MANIFEST_NAME)]
    assert found and len(found) == len(set(found))


def test_many_flipped_bytes_are_counted(golden: Path, tmp_path: Path) -> None:
    catalog = settled(catalog_in(recorded(golden, tmp_path / "src"), golden))
    for name in list(catalog.tensors)[:7]:
        (file,) = next(iter(catalog.tensors[name].placements[0].holders.values()))
        flip(catalog, file, name)
    errors = run(catalog)
    assert all("and 4 more" in str(error) for error in errors.values())


def test_parameters_made_of_others(golden: Path, tmp_path: Path, reads: list[ReadMade]) -> None:
    catalog = catalog_in(recorded(golden, tmp_path / "src"), golden)
    rules = [Rename("head.weight", "lm"), Transpose("layers.0.wo.weight", "turned")]
    made = apply_rules({n: catalog.tensors[n] for n in ("head.weight", "layers.0.wo.weight")}, rules)
    catalog = settled(Catalog(catalog.files, made, {}, {}))
    reads.clear()
    assert run(catalog) == {}
    read_of = looked(reads, catalog)
    assert Counter(name for _, name in read_of) == {"head.weight": 4, "layers.0.wo.weight": 4}


@pytest.mark.parametrize("manifest", [None, {}, {"size": 5}], ids=["none", "other files", "another size"])
def test_nothing_on_record(manifest: Optional[dict[str, int]], golden: Path, tmp_path: Path) -> None:
    root = recorded(golden, tmp_path / "src")
    known = digest_file(read_index(str(root / "rank_0/net.safetensors")))
    (root / MANIFEST_NAME).unlink()
    if manifest is not None:
        held = {f"rank_{n}/net.safetensors": known._replace(**manifest) for n in range(8) if manifest}
        write_manifest(str(root), Manifest(held))
    errors = run(catalog_in(root, golden))
    assert {type(error) for error in errors.values()} <= {UsageError, PeerError}
    assert all(MANIFEST_NAME in str(error) and "verify='full'" in str(error) for error in errors.values())


def test_each_host_looks_at_its_own_files(golden: Path, tmp_path: Path, reads: list[ReadMade]) -> None:
    catalog = settled(catalog_in(recorded(golden, tmp_path / "src"), golden))
    halves = {number: frozenset({0, 1} if number < 4 else {2, 3}) for number in range(8)}
    shares = audit_module._deal(audit_module._pairs(catalog.tensors.values()), catalog, halves, RANKS)
    for rank, share in enumerate(shares):
        assert {file < 4 for file in share} == {rank < 2}
    reads.clear()
    assert run(catalog, halves) == {}
    read_of = looked(reads, catalog)
    assert set(read_of.values()) == {1}


def test_a_file_that_was_cut_short_meanwhile(golden: Path, tmp_path: Path) -> None:
    root = recorded(golden, tmp_path / "src")
    catalog = catalog_in(root, golden)
    victim = root / "rank_6/net.safetensors"
    victim.write_bytes(victim.read_bytes()[:-64])
    errors = run(catalog)
    assert any(isinstance(error, (UsageError, StorageError)) for error in errors.values())
    assert all("rank_6" in str(error) for error in errors.values())
