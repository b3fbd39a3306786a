"""The manifest of digests: what it holds, what it detects, and when it is rejected."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors.numpy import save_file

from ms_ckpt_ext import errors
from ms_ckpt_ext.engine.integrity import digests
from ms_ckpt_ext.engine.integrity.folder import check_digests
from ms_ckpt_ext.engine.integrity.manifest import (
    MANIFEST_NAME,
    FileDigests,
    Manifest,
    load_manifest,
    put_on,
    recorded_digests,
    take_off,
    update_manifest,
    write_manifest,
)
from ms_ckpt_ext.formats.registry import read_index

BIG = (3 << 20) + 5  # several buffers and a rest


def write(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    held = {"w": rng.integers(0, 255, BIG, np.uint8), "s": np.array(7, np.int32), "none": np.zeros((0, 4), np.float32)}
    save_file(held, path)
    return held


def recorded(root: Path, *names: str) -> Manifest:
    return Manifest({name: digests.digest_file(read_index(str(root / name))) for name in names})


def test_a_digest_is_that_of_the_plain_bytes(tmp_path: Path) -> None:
    held = write(tmp_path / "a.safetensors")
    index = read_index(str(tmp_path / "a.safetensors"))
    expected = {name: xxhash.xxh3_128_hexdigest(array.tobytes()) for name, array in held.items()}
    for workers in (1, 3):
        assert digests.digest_tensors(index, workers=workers) == expected
    assert digests.digest_tensors(index, ["s"]) == {"s": expected["s"]}
    assert expected["none"] == "99aa06d3014798d86001c324468d497f"
    with pytest.raises(KeyError):
        digests.digest_tensors(index, ["t"])


def test_written_and_read_again(tmp_path: Path) -> None:
    assert load_manifest(str(tmp_path)) is None
    assert load_manifest(str(tmp_path / "no such folder")) is None
    manifest = Manifest({"a": FileDigests(3, {"ü/w": "0" * 32}), "rank_0/b": FileDigests(0, {})})
    write_manifest(str(tmp_path), manifest)
    assert load_manifest(str(tmp_path)) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


GOOD = Manifest({"a": FileDigests(3, {"w": "0" * 32})}).to_json().decode()


@pytest.mark.parametrize(
    "raw",
    ["", "[]", "{}", "null", "[" * 100_000, GOOD[:-3]]
    + [GOOD.replace(old, new) for old, new in ((": 1,", ": 2,"), ("xxh3-128", "md5"), ("0" * 32, "0" * 31))]
    + [GOOD.replace(": 3,", f': 3, "framing": {new},') for new in ("7", '"x"', "[]")]
    + [GOOD.replace(": 3,", new) for new in (": -3,", ': "3",', ": true,", f": {1 << 63},")],
)
def test_a_damaged_manifest_is_told(raw: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(raw)
    with pytest.raises(errors.FormatError, match="is not a manifest of digests .*remove it"):
        load_manifest(str(tmp_path))
    update_manifest(str(tmp_path), {})
    assert load_manifest(str(tmp_path)) == Manifest({})


def test_what_check_finds(tmp_path: Path) -> None:
    names = ("a.safetensors", "rank_0/b.safetensors", "c.safetensors")
    for name in names:
        write(tmp_path / name)
    manifest = recorded(tmp_path, *names)
    assert check_digests(str(tmp_path), manifest, workers=2) == []
    path = tmp_path / names[0]
    raw = bytearray(path.read_bytes())
    raw[-BIG // 2] ^= 1
    path.write_bytes(raw)
    (fault,) = check_digests(str(tmp_path), manifest)
    assert fault[:2] == (names[0], "w") and fault.expected == manifest.files[names[0]].tensors["w"]
    assert str(fault).startswith("parameter 'w' in 'a.safetensors': found ")
    (tmp_path / names[1]).write_bytes(b"short")
    (tmp_path / names[2]).unlink()
    faults = check_digests(str(tmp_path), manifest, names[1:])
    assert [(f.file, f.tensor, f.found) for f in faults] == [(names[1], None, "5 bytes"), (names[2], None, "no file")]


def test_tensors_that_only_one_side_has(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors")
    known = recorded(tmp_path, "a.safetensors").files["a.safetensors"]
    changed = dict(known.tensors)
    changed["gone"] = changed.pop("s")
    faults = check_digests(str(tmp_path), Manifest({"a.safetensors": known._replace(tensors=changed)}))
    assert {(f.tensor, f.found == "no such tensor", f.expected == "no such tensor") for f in faults} == {
        ("gone", True, False),
        ("s", False, True),
    }


def test_which_manifest_is_believed(tmp_path: Path) -> None:
    """The one beside the file, else the one a folder up; of both, one that tells more than a size."""
    path = tmp_path / "rank_0" / "net.safetensors"
    above, beside = str(tmp_path), str(path.parent)
    write(path)
    assert recorded_digests(str(path)) is None
    known = digests.digest_file(read_index(str(path)))
    write_manifest(above, Manifest({"rank_0/net.safetensors": known}))
    assert recorded_digests(str(path)) == (above, "rank_0/net.safetensors", known)
    nearer = known._replace(tensors={"w": "1" * 32})
    write_manifest(beside, Manifest({"net.safetensors": nearer, "other": known}))
    assert recorded_digests(str(path)) == (beside, "net.safetensors", nearer)
    write_manifest(beside, Manifest({"net.safetensors": FileDigests(known.size, {})}))
    assert recorded_digests(str(path)) == (above, "rank_0/net.safetensors", known)
    write_manifest(above, Manifest({}))
    assert recorded_digests(str(path)) == (beside, "net.safetensors", FileDigests(known.size, {}))


def test_an_update_keeps_what_still_fits(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "c.safetensors"):
        write(tmp_path / name)
    before = recorded(tmp_path, "a.safetensors", "b.safetensors")
    write_manifest(str(tmp_path), before)
    (tmp_path / "b.safetensors").write_bytes(b"written anew")
    new = recorded(tmp_path, "c.safetensors")
    update_manifest(str(tmp_path), new.files)
    found = load_manifest(str(tmp_path))
    assert found is not None and set(found.files) == {"a.safetensors", "c.safetensors"}
    assert json.loads((tmp_path / MANIFEST_NAME).read_bytes())["algorithm"] == "xxh3-128"


def test_files_at_once_are_all_put_on_record(tmp_path: Path) -> None:
    """Also before there is a manifest, and while entries are removed; a killed process holds no lock."""
    names = [f"{number}.ckpt" for number in range(24)]
    (tmp_path / f".{MANIFEST_NAME}.lock").touch()
    for name in names:
        (tmp_path / name).write_bytes(b"x")

    def note(name: str) -> None:
        put_on(str(tmp_path), {name: FileDigests(1, {}).to_json()}, sync=False)
        if name < "2":
            take_off(str(tmp_path), [name], sync=False)
        else:
            update_manifest(str(tmp_path), {name: FileDigests(1, {"w": "0" * 32})})

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(note, names))
    found = load_manifest(str(tmp_path))
    assert found is not None and set(found.files) == {name for name in names if name >= "2"}
    assert all(held.tensors for held in found.files.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, MANIFEST_NAME])


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_what_is_replaced_is_off_the_record_everywhere(depth: int, tmp_path: Path) -> None:
    """In its folder, and in any folder above. A manifest is removed with its last entry."""
    inner = tmp_path.joinpath("a", "b", "c", "d")
    inner.mkdir(parents=True)
    for folder in (inner, *list(inner.parents)[:4]):
        begins = "".join(f"{part}/" for part in inner.relative_to(folder).parts)
        more = {f"{begins}other.ckpt": FileDigests(1, {})} if folder == inner.parent else {}
        write_manifest(str(folder), Manifest({f"{begins}net.ckpt": FileDigests(1, {}), **more}))
    target = (inner, *inner.parents)[depth]
    take_off(str(target), [(inner / "net.ckpt").relative_to(target).as_posix()], sync=False)
    (left,) = tmp_path.rglob(MANIFEST_NAME)
    assert left.parent == inner.parent
    held = load_manifest(str(left.parent))
    assert held is not None and set(held.files) == {"d/other.ckpt"}


def test_ranks_at_once_take_their_own_files_off(tmp_path: Path) -> None:
    """Each reads, changes and replaces the one manifest above; none undoes what another did."""
    ranks = range(16)
    for rank in ranks:
        (tmp_path / f"rank_{rank}").mkdir()
    held = {f"rank_{rank}/{name}": FileDigests(1, {}) for rank in ranks for name in ("net", "other")}
    write_manifest(str(tmp_path), Manifest(held))
    with ThreadPoolExecutor(len(ranks)) as pool:
        list(pool.map(lambda rank: take_off(str(tmp_path / f"rank_{rank}"), ["net"], sync=False), ranks))
    left = load_manifest(str(tmp_path))
    assert left is not None and set(left.files) == {f"rank_{rank}/other" for rank in ranks}
