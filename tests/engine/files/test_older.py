"""What a new result replaces: all of an older result of its kind, and nothing that came from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ms_ckpt_ext import errors, transform_checkpoint_by_rank, transform_checkpoints
from ms_ckpt_ext.api.jobs import reshard
from ms_ckpt_ext.core.geometry.layout import Layout
from tests.support.checkpoints import merge, source, strategy_of, tree


def ways(root: Path, count: int) -> Path:
    """A strategy that cuts everything into `count`."""
    path = root / f"ways_{count}.ckpt"
    strategy_of({name: Layout((count,), ((0,), ())) for name in ("a.w", "b.w", "c.w", "d.w")}, path)
    return path


def transform(root: Path, target: Path, count: int, prefix: str = "net_", form: str = "ckpt") -> Any:
    arguments = (root / "shards", target, prefix, root / "strategy.ckpt", ways(root, count))
    return transform_checkpoints(*arguments, output_format=form)


def cut(root: Path, target: Path, count: int, form: str, rank: Any = None) -> Any:
    known = root / "strategy.ckpt"
    return reshard(root / "shards", target, strategy=known, to_strategy=ways(root, count), to=form, rank=rank)


def test_transform_to_fewer_ranks_and_another_format(tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    for count, form in ((4, "ckpt"), (2, "ckpt"), (2, "safetensors"), (4, "ckpt")):
        transform(root, target, count, form=form)
        assert sorted(tree(target)) == [f"rank_{rank}/net_{rank}.{form}" for rank in range(count)]


def test_transform_under_another_prefix_is_another_result(tmp_path: Path) -> None:
    """Several checkpoints of one training go into the same rank folders, one call each."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    transform(root, target, 2, "net-1_1_")
    transform(root, target, 2, "net-2_1_")
    assert len(tree(target)) == 4


def test_transform_leaves_what_is_not_ours(tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    transform(root, target, 4)
    changed = target / "rank_3/net_3.ckpt"
    changed.write_bytes(changed.read_bytes() + b"by hand")
    (target / "rank_0/net_0.safetensors").write_bytes(b"another's")
    transform(root, target, 2)
    left = {"rank_0/net_0.ckpt", "rank_0/net_0.safetensors", "rank_1/net_1.ckpt", "rank_3/net_3.ckpt"}
    assert set(tree(target)) == left


def test_files_of_one_folder_by_rank(tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    files = {rank: root / f"shards/rank_{rank}/net.safetensors" for rank in range(4)}
    for rank in range(2):
        path = target / f"net_{rank}.ckpt"
        transform_checkpoint_by_rank(rank, files, path, root / "strategy.ckpt", ways(root, 2))
    assert sorted(tree(target)) == ["net_0.ckpt", "net_1.ckpt"]


def test_reshard_in_another_format(tmp_path: Path) -> None:
    """All ranks and one of them, each over the other's result."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    for form, rank in (("ckpt", None), ("safetensors", None), ("ckpt", 1), ("ckpt", 0), ("safetensors", None)):
        cut(root, target, 2, form, rank)
        forms = dict.fromkeys(("rank_0", "rank_1"), form)
        if rank == 1:
            forms["rank_0"] = "safetensors"
        assert sorted(tree(target)) == sorted(f"{folder}/net.{kind}" for folder, kind in forms.items())


def downloaded(target: Path) -> dict[str, bytes]:
    """A model as `huggingface-cli download` leaves it."""
    target.mkdir(exist_ok=True)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in names:
        (target / name).write_bytes(b"theirs " + name.encode())
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    return tree(target)


@pytest.mark.parametrize("naming", ["mindspore", "huggingface"])
@pytest.mark.parametrize("ours_too", [False, True])
def test_a_downloaded_model_is_not_removed(ours_too: bool, naming: str, tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    if ours_too:
        merge(root, target, naming="huggingface")
    before = {**downloaded(target), **tree(target)}
    with pytest.raises(errors.UsageError, match=r"model-00001-of.* of a Hugging Face model .*choose another target"):
        merge(root, target, naming=naming)
    assert tree(target) == before


def test_a_downloaded_model_of_one_file_is_not_shadowed(tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    target.mkdir()
    (target / "model.safetensors").write_bytes(b"theirs")
    with pytest.raises(errors.UsageError, match=r"'model.safetensors' of a Hugging Face model .* takes it before"):
        merge(root, target, naming="huggingface")
    assert tree(target) == {"model.safetensors": b"theirs"}


def test_a_model_of_ours_is_replaced(tmp_path: Path) -> None:
    """One file, then more and fewer parts."""
    root, target = source(tmp_path / "src"), tmp_path / "out"
    files = {rank: root / f"shards/rank_{rank}/net.safetensors" for rank in range(4)}
    transform_checkpoint_by_rank(0, files, target / "model.safetensors", root / "strategy.ckpt")
    for part_bytes in (9000, 20_000, 1 << 30):
        merge(root, target, naming="huggingface", part_bytes=part_bytes)
        merge(root, tmp_path / str(part_bytes), naming="huggingface", part_bytes=part_bytes)
        assert tree(target) == tree(tmp_path / str(part_bytes))


def test_a_merge_of_mindspore_is_replaced_by_any_naming(tmp_path: Path) -> None:
    root, target = source(tmp_path / "src"), tmp_path / "out"
    for naming in ("huggingface", "mindspore"):
        merge(root, target, part_bytes=9000)
        (target / ".ms_ckpt_ext.json").unlink()
        merge(root, target, naming=naming)
        merge(root, tmp_path / naming, naming=naming)
        assert tree(target) == tree(tmp_path / naming)


def test_what_transformers_asks_of_a_header(tmp_path: Path) -> None:
    from safetensors import safe_open

    root = source(tmp_path / "src")
    for naming, framework in (("huggingface", "pt"), ("mindspore", "ms")):
        merge(root, tmp_path / naming, naming=naming)
        for path in (tmp_path / naming).glob("*.safetensors"):
            with safe_open(path, "np") as file:
                assert file.metadata() == {"format": framework}
