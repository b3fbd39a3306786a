"""Functions return what stock MindSpore's return; where that is None, they may return a report instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest

import ms_ckpt_ext
from ms_ckpt_ext.engine.files.job import Report
from tests.support import family

pytestmark = pytest.mark.stock


@pytest.fixture(scope="module")
def held(ms: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.checkpoint(tmp_path_factory.mktemp("held"))


Call = Callable[[Any, Path, Path], Any]


def files(root: Path) -> list[str]:
    return [*family.rank_files(root, "ckpt").values()]


WHOLE = {"a.w": ([1], [-1, -1], [], 0, True, ""), "b.w": ([1], [-1], [], 0, True, "")}
LOADS: dict[str, Call] = {
    "ckpt": lambda m, r, o: m.load_distributed_checkpoint(family.network(), files(r), None, family.strategy_file(r)),
    "ckpt with layouts": lambda m, r, o: m.load_distributed_checkpoint(
        family.network(), files(r), WHOLE, family.strategy_file(r)
    ),
    "ckpt, not compiled": lambda m, r, o: m.load_distributed_checkpoint(
        family.network(), files(r), {}, family.strategy_file(r)
    ),
    "ckpt, strict": lambda m, r, o: m.load_distributed_checkpoint(
        family.network(), files(r), None, family.strategy_file(r), strict_load=True
    ),
    "ckpt, all by name": lambda m, r, o: m.load_distributed_checkpoint(
        network=family.network(),
        checkpoint_filenames=files(r),
        train_strategy_filename=family.strategy_file(r),
        format="ckpt",
    ),
    "safetensors": lambda m, r, o: m.load_distributed_checkpoint(
        family.network(), format="safetensors", unified_safetensors_dir=str(r / "merged")
    ),
    "a parameter dict": lambda m, r, o: family.told(
        m.load_distributed_checkpoint(
            family.network(),
            format="safetensors",
            unified_safetensors_dir=str(r / "merged"),
            return_param_dict=True,
        )
    ),
    "save mode": lambda m, r, o: m.load_distributed_checkpoint(
        None,
        format="safetensors",
        unified_safetensors_dir=str(r / "merged"),
        predict_strategy=family.strategy_file(r),
        dst_safetensors_dir=str(o),
    ),
    "save mode of one rank": lambda m, r, o: m.load_distributed_checkpoint(
        None,
        format="safetensors",
        unified_safetensors_dir=str(r / "merged"),
        predict_strategy=family.strategy_file(r),
        dst_safetensors_dir=str(o),
        rank_id=1,
    ),
}
NOTHING: dict[str, Call] = {
    "merge_pipeline_strategys": lambda m, r, o: m.merge_pipeline_strategys(str(r / "stages"), str(o / "m.ckpt")),
    "ckpt_to_safetensors": lambda m, r, o: m.ckpt_to_safetensors(files(r)[0], str(o)),
    "safetensors_to_ckpt": lambda m, r, o: m.safetensors_to_ckpt(family.rank_files(r, "safetensors")[0], str(o)),
}
REPORTS: dict[str, Call] = {
    "unified_safetensors": lambda m, r, o: m.unified_safetensors(
        str(r / "safetensors"), family.strategy_file(r), str(o)
    ),
    "transform_checkpoints": lambda m, r, o: m.transform_checkpoints(
        str(r / "ckpt"), str(o), "x", family.strategy_file(r), None
    ),
    "transform_checkpoint_by_rank": lambda m, r, o: m.transform_checkpoint_by_rank(
        0, family.rank_files(r, "ckpt"), str(o / "x.ckpt"), family.strategy_file(r), None
    ),
}


@pytest.mark.parametrize("title", [*LOADS, *NOTHING])
def test_the_same_answer(title: str, ms: Any, held: Path, tmp_path: Path) -> None:
    call = {**LOADS, **NOTHING}[title]
    stock = call(ms, held, tmp_path / "stock")
    ours = call(ms_ckpt_ext, held, tmp_path / "ours")
    assert ours == stock and type(ours) is type(stock)
    ms_ckpt_ext.install()
    try:
        assert call(ms, held, tmp_path / "installed") == stock
    finally:
        ms_ckpt_ext.uninstall()


@pytest.mark.parametrize("title", REPORTS)
def test_reports_where_stock_says_nothing(title: str, ms: Any, held: Path, tmp_path: Path) -> None:
    (tmp_path / "stock").mkdir()
    assert REPORTS[title](ms, held, tmp_path / "stock") is None
    assert isinstance(REPORTS[title](ms_ckpt_ext, held, tmp_path / "ours"), Report)


@pytest.mark.parametrize(
    "more", [{"mode": "direct"}, {"verify": "replicas"}, {"prefetch": 2}, {"choice_func": lambda _: True}], ids=" ".join
)
def test_calls_of_our_own_tell_what_went_where(more: dict[str, Any], ms: Any, held: Path) -> None:
    """Also those of forms that MindSpore does not take."""
    answer = ms_ckpt_ext.load_distributed_checkpoint(
        family.network(), files(held), None, family.strategy_file(held), **more
    )
    assert answer == ([], ["global_step"])
    for filenames, predict, trained in (
        (str(held / "ckpt"), None, family.strategy_file(held)),
        (files(held), None, str(held / "stages")),
        (files(held), family.strategy_file(held), Path(family.strategy_file(held))),
    ):
        answer = ms_ckpt_ext.load_distributed_checkpoint(family.network(), filenames, predict, trained)
        assert isinstance(answer, tuple)
