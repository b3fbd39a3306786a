"""Every format and container as a source of the jobs: the result is that of the safetensors files, byte for byte."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_ckpt_ext import errors, load_distributed_checkpoint, load_key, training_scalars, unified_safetensors
from tests.support.checkpoints import assert_nothing_complete, read_file, read_merged, shard, tree
from tests.support.formats import KEY, KINDS, SEALED_KINDS, WRONG, format_of, key_of, make_source, scalars_of

CASES = ("formats_dp2_tp4", "formats_dp2_tp4_zero")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_merge(case: str, kind: str, golden: Path, tmp_path: Path) -> None:
    source = make_source(golden, case, kind, tmp_path / "src")
    unified_safetensors(source, golden / case / "strategy.ckpt", tmp_path / "out", **key_of(kind), crc_check=True)
    merged, scalars = read_merged(tmp_path / "out")
    assert merged == read_file(golden / "full/model.safetensors")
    assert scalars == scalars_of(golden, case, kind) and len(scalars) == 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_recut(case: str, kind: str, golden: Path, tmp_path: Path) -> None:
    source = make_source(golden, case, kind, tmp_path / "src")
    load_distributed_checkpoint(
        None, None, golden / "tp4_pp2/strategy.ckpt", golden / case / "strategy.ckpt", format=format_of(kind),
        unified_safetensors_dir=source, dst_safetensors_dir=tmp_path / "out", **key_of(kind),
    )  # fmt: skip
    for rank in range(8):
        expected = read_file(shard(golden / "tp4_pp2/shards" / f"rank_{rank}"))
        found = read_file(tmp_path / "out" / f"rank_{rank}/net.safetensors")
        assert found == {**expected, **scalars_of(golden, case, kind)}


@pytest.mark.parametrize("kind", KINDS)
def test_training_scalars(kind: str, golden: Path, tmp_path: Path) -> None:
    case = CASES[0]
    source = make_source(golden, case, kind, tmp_path / "src")
    for strategy in (golden / case / "strategy.ckpt", None):
        found = training_scalars(source, strategy, **key_of(kind))
        assert {n: v.tobytes() for n, v in found.items()} == {
            n: t.data for n, t in scalars_of(golden, case, kind).items()
        }
        assert found["global_step"].dtype == np.int32 and found["learning_rate"].shape == ()


LIVE_ONLY: list[tuple[dict[str, Any], str]] = [
    ({"verify": "full"}, "ms_ckpt_ext.verify"),
    ({"mode": "direct"}, "always read directly"),
    ({"bucket_bytes": 1 << 20}, "buffer_bytes"),
    ({"prefetch": 2}, "max_process_num"),
    ({"trace": "t.json"}, "report"),
    ({"timeout": 1.0}, "do not wait"),
]


def test_files_named_one_by_one(golden: Path, tmp_path: Path) -> None:
    case = golden / CASES[0]
    files = [str(next((case / "ckpt" / f"rank_{rank}").iterdir())) for rank in range(8)]

    def load(names: Any, **more: Any) -> None:
        load_distributed_checkpoint(
            None, names, golden / "tp4/strategy.ckpt", case / "strategy.ckpt",
            dst_safetensors_dir=tmp_path / "out", **more,
        )  # fmt: skip

    for wrong, said in ((files[:7], "has 7 files, but the training strategy is for 8 ranks"), ([], "has 0 files")):
        with pytest.raises(errors.UsageError, match=said):
            load(wrong)
    with pytest.raises(errors.UsageError, match="checkpoint_filenames goes with format='ckpt'"):
        load(files, format="safetensors")
    with pytest.raises(errors.UsageError, match="without unified_safetensors_dir"):
        load(files, unified_safetensors_dir=case / "ckpt")
    with pytest.raises(errors.ArgumentTypeError, match="must be a list of paths"):
        load(7)
    with pytest.raises(errors.DiscoveryError, match="the file of rank 0 in checkpoint_filenames does not exist"):
        load([f"{file}.gone" for file in files])
    with pytest.raises(errors.DiscoveryError, match=r"the file of rank 5 in checkpoint_filenames .*\.gone"):
        load([*files[:5], f"{files[5]}.gone", *files[6:]])
    for option, instead in LIVE_ONLY:
        with pytest.raises(errors.UsageError, match=f"{next(iter(option))} is for loads into a network.*{instead}"):
            load(files, **option)
    for wrong in ({"mode": "fast"}, {"verify": "maybe"}, {"timeout": 0}):
        with pytest.raises(errors.UsageError, match="must be"):
            load(files, **wrong)
    assert not (tmp_path / "out").exists()
    load(files)
    expected = read_file(shard(golden / "tp4/shards/rank_2"))
    assert read_file(tmp_path / "out/rank_2/net.safetensors") == {**expected, **scalars_of(golden, CASES[0])}
    before = tree(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    load(case / "ckpt")
    assert tree(tmp_path / "out") == before


def test_the_key_may_be_in_the_environment_or_a_file(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key in the environment opens encrypted files and does not affect plain ones."""
    case = golden / CASES[0]
    sealed = make_source(golden, CASES[0], "ckpt_aes_cbc", tmp_path / "src")
    (tmp_path / "key").write_text(f"hex:{KEY.hex()}\n")
    told = training_scalars(sealed, dec_key=load_key(file=str(tmp_path / "key")), dec_mode="AES-CBC")
    monkeypatch.setenv("MS_CKPT_EXT_DEC_KEY", f"hex:{KEY.hex()}")
    assert training_scalars(sealed) == training_scalars(case / "ckpt") == told


@pytest.mark.parametrize("kind", SEALED_KINDS)
def test_a_wrong_key(kind: str, golden: Path, tmp_path: Path) -> None:
    source = make_source(golden, CASES[0], kind, tmp_path / "src")
    before = len(os.listdir("/proc/self/fd"))
    for more, said in (({"dec_key": WRONG}, "key is wrong"), ({}, r"is encrypted .*; pass the key .*dec_key")):
        with pytest.raises(errors.DecryptionError, match=said) as caught:
            unified_safetensors(
                source,
                golden / CASES[0] / "strategy.ckpt",
                tmp_path / "out",
                **{**key_of(kind), "dec_key": None, **more},
            )
        assert "0123456789" not in str(caught.value)
        assert str(source) in str(caught.value)
        assert_nothing_complete(tmp_path / "out")
    assert len(os.listdir("/proc/self/fd")) == before


def test_arguments_of_keys(golden: Path) -> None:
    source = golden / CASES[0] / "ckpt"
    for more, kind, said in (
        ({"dec_key": "0123456789ABCDEF"}, errors.ArgumentTypeError, "a key must be bytes, not str"),
        ({"dec_key": b"0123"}, errors.UsageError, "a key of 4 bytes"),
        ({"dec_key": KEY, "dec_mode": "ROT13"}, errors.UsageError, "no such dec_mode; choose"),
        ({"dec_mode": 1}, errors.ArgumentTypeError, "dec_mode must be a str"),
        ({"dec_key": KEY}, errors.DecryptionError, "is not encrypted, but a key is given"),
    ):
        with pytest.raises(kind, match=said) as caught:
            training_scalars(source, **more)  # type: ignore[arg-type]
        assert "0123" not in str(caught.value)


def test_a_damaged_file_with_a_checksum(golden: Path, tmp_path: Path) -> None:
    case = golden / CASES[0]
    shutil.copytree(case / "ckpt_crc", tmp_path / "src")
    (file,) = (tmp_path / "src/rank_3").iterdir()
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    with pytest.raises(errors.ChecksumError, match=r"net_rank_3-3_1200.ckpt.: CRC-32 of bytes"):
        unified_safetensors(tmp_path / "src", case / "strategy.ckpt", tmp_path / "out", crc_check=True)
    assert_nothing_complete(tmp_path / "out")
