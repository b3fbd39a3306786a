"""A file where a directory is expected, and vice versa: accepted as MindSpore does, or named in the error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import ms_ckpt_ext as mx
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import CheckpointError, CoverageError
from tests.support.checkpoints import source, strategy_of

WEIGHT = np.arange(24, dtype=np.float32).reshape(6, 4)


class Places(NamedTuple):
    """A whole model in one file, in both formats; rank folders; and strategies."""

    root: Path

    @property
    def file(self) -> Path:
        return self.root / "whole/net.safetensors"

    @property
    def ckpt(self) -> Path:
        return self.root / "whole/net.ckpt"

    @property
    def halves(self) -> Path:
        return self.root / "halves.ckpt"

    @property
    def shards(self) -> Path:
        return self.root / "run/shards"

    @property
    def strategy(self) -> Path:
        return self.root / "run/strategy.ckpt"

    @property
    def out(self) -> Path:
        return self.root / "out"


@pytest.fixture
def places(tmp_path: Path) -> Places:
    made = Places(tmp_path)
    (tmp_path / "whole").mkdir()
    save_file({"w": WEIGHT}, made.file)
    mx.convert(made.file, made.ckpt)
    strategy_of({"w": Layout((2,), ((0,), ()))}, made.halves)
    source(tmp_path / "run")
    return made


def halves(root: Path, name: str) -> list[bytes]:
    found = []
    for rank in range(2):
        with mx.load(next((root / f"rank_{rank}").glob(name))) as held:
            found.append(held["w"].numpy().tobytes())
    return found


RIGHT = [WEIGHT[:3].tobytes(), WEIGHT[3:].tobytes()]


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
@pytest.mark.parametrize("which", ["file", "ckpt"])
def test_one_file_is_cut_for_ranks(which: str, form: str, places: Places) -> None:
    path = getattr(places, which)
    mx.transform_checkpoints(str(path), str(places.out), "net", None, str(places.halves), 1, form)
    assert halves(places.out, f"net?.{form}") == RIGHT
    mx.load_distributed_checkpoint(
        None,
        format=path.suffix[1:],
        unified_safetensors_dir=path,
        predict_strategy=places.halves,
        dst_safetensors_dir=places.root / "cut",
        output_format=form,
    )
    assert halves(places.root / "cut", f"net.{form}") == RIGHT
    mx.reshard(path, places.root / "again", to_strategy=places.halves, format=path.suffix[1:])
    assert halves(places.root / "again", "net.*") == RIGHT


def test_one_file_is_looked_at(places: Places) -> None:
    assert mx.load(places.file)["w"].numpy().tobytes() == WEIGHT.tobytes()
    assert mx.verify(places.file, places.ckpt).ok  # type: ignore[union-attr]
    assert mx.inspect(places.ckpt).kind == "file"
    assert mx.training_scalars(places.file) == {}
    (scalars,) = (places.shards / "rank_0").iterdir()
    assert mx.training_scalars(scalars).keys() == mx.training_scalars(places.shards).keys() != set()
    mx.merge(places.file, places.out)
    (merged,) = places.out.glob("part*.safetensors")
    assert load_file(merged)["w"].tobytes() == WEIGHT.tobytes()


def test_the_file_of_one_rank_is_not_taken_for_the_whole(places: Places) -> None:
    rank = next((places.shards / "rank_0").iterdir())
    for call in (
        lambda: mx.transform_checkpoints(rank, places.out, "net", places.strategy),
        lambda: mx.reshard(rank, places.out, strategy=places.strategy),
        lambda: mx.merge(rank, places.out, strategy=places.strategy),
    ):
        with pytest.raises(CoverageError, match="no file holds region"):
            call()
    assert not places.out.exists()


def test_the_folder_of_one_rank_is_a_model_of_which_nothing_else_is_known(
    places: Places, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (places.shards / "rank_0", next((places.shards / "rank_1").iterdir())):
        caplog.clear()
        mx.merge(path, places.root / f"merged {path.name}")
        assert "beside it there are 3 others: it is taken for the whole model, which is wrong" in caplog.text
        assert f"give {str(places.shards)!r} and the strategy" in caplog.text
    caplog.clear()
    mx.merge(places.file, places.out)
    assert "of one rank" not in caplog.text


Call = Callable[[Places], Any]
TOLD: dict[str, tuple[Call, str]] = {
    "unified_safetensors": (
        lambda p: mx.unified_safetensors(p.file, p.halves, p.out),
        "src_dir must be the directory that holds the rank folders, got the file",
    ),
    "transform_checkpoints": (
        lambda p: mx.transform_checkpoints(p.halves.with_suffix(".json"), p.out, "net"),
        "src_checkpoints_dir is the file .* no checkpoint by its name",
    ),
    "transform_checkpoint_by_rank": (
        lambda p: mx.transform_checkpoint_by_rank(0, {0: p.shards}, p.out / "a.ckpt"),
        "checkpoint_files_map gives rank 0 the directory",
    ),
    "load_distributed_checkpoint": (
        lambda p: mx.load_distributed_checkpoint(None, p.file, dst_safetensors_dir=p.out),
        "is a file, and none of the format 'ckpt'",
    ),
    "load_distributed_checkpoint, a list": (
        lambda p: mx.load_distributed_checkpoint(None, [p.shards], dst_safetensors_dir=p.out),
        "the file of rank 0 in checkpoint_filenames is a directory",
    ),
    "load_checkpoint": (lambda p: mx.load_checkpoint(p.shards), "ckpt_file_name is the directory .*one file is needed"),
    "load_segmented_checkpoints": (
        lambda p: mx.load_segmented_checkpoints(p.ckpt),
        "ckpt_file_dir .* is a file, and the directory that holds it is needed",
    ),
    "merge_pipeline_strategys": (
        lambda p: mx.merge_pipeline_strategys(p.halves, p.out),
        "is not a directory of strategy files",
    ),
    "verify of a manifest": (lambda p: mx.verify(p.file, manifest=True), "is a file; a manifest lies in a directory"),
    "reshard of a strategy": (lambda p: mx.reshard(p.halves, p.out), "is a strategy file, which has the same suffix"),
    "convert of a strategy": (lambda p: mx.convert(p.halves, p.out, to="safetensors"), "is a strategy file"),
    "load of a strategy": (lambda p: mx.load(p.halves), "is a strategy file"),
}


@pytest.mark.parametrize("what", TOLD)
def test_it_is_called_what_it_is(what: str, places: Places) -> None:
    places.halves.with_suffix(".json").write_text("{}")
    call, message = TOLD[what]
    with pytest.raises(CheckpointError, match=message) as caught:
        call(places)
    assert not re.search("no such|does not exist", str(caught.value))
    assert not places.out.exists()
