"""TransformParametersD2D, and transfers of distributed tensors, which tell their own layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import mindspore as ms
import numpy as np
import pytest

from ms_ckpt_ext import TransformParametersD2D, transfer
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import StrategyError, UsageError
from tests.bridge.transfer.test_cells import errors, filled, run
from tests.bridge.transfer.test_cells_refused import array_of, check, values
from tests.support.cells import threads  # noqa: F401 - a fixture
from tests.support.checkpoints import strategy_of

pytestmark = pytest.mark.usefixtures("threads")


def strategies(root: Path) -> tuple[Path, Path]:
    strategy_of({"train.w": Layout((2,), ((0,), ()))}, root / "train.ckpt")
    strategy_of({"serve.w": Layout((2,), ((), ()))}, root / "serve.ckpt")
    return root / "train.ckpt", root / "serve.ckpt"


def fits(source: str, target: str) -> bool:
    return source.split(".")[-1] == target.split(".")[-1]


def test_names_that_a_function_matches(tmp_path: Path) -> None:
    paths = strategies(tmp_path)

    def work(rank: int) -> Any:
        source = filled({"train.w": values(rank, rank), "train.extra": values(1)})
        target = filled({"serve.w": values(7, 7, 7, 7), "serve.other": values(7)})
        moved = TransformParametersD2D(source, target, *map(str, paths), fits)
        found = []
        for number in range(2):
            source.p0.set_data(ms.Tensor(values(rank + number, rank + number)))
            assert moved.transform() is True
            found.append(array_of(target, "serve.w")[:, 0].tolist())
        moved.transform((False, False))
        moved.close()
        return found, array_of(target, "serve.other").tolist()

    assert run(2, work) == [([[0, 0, 1, 1], [1, 1, 2, 2]], values(7).tolist())] * 2


@pytest.mark.parametrize(
    ("match", "kind", "said"),
    [
        (None, ValueError, "no parameter of the source"),
        (lambda one, other: 1, TypeError, "must return a bool"),
        (lambda one, other: other == "serve.w", ValueError, "two sources"),
        (3, TypeError, "callable"),
    ],
)
def test_functions_that_match_nothing_or_too_much(tmp_path: Path, match: Any, kind: Any, said: str) -> None:
    paths = strategies(tmp_path)

    def work(rank: int) -> None:
        source = filled({"train.w": values(rank, rank), "train.x": values(1)})
        TransformParametersD2D(source, filled({"serve.w": values(*[7] * 4)}), *map(str, paths), match)

    for error in errors(2, work):
        assert isinstance(error, kind)
        assert said in str(error)


def test_strategies_and_flags_are_needed(tmp_path: Path) -> None:
    paths = strategies(tmp_path)
    source, target = filled({"train.w": values(1, 2)}), filled({"serve.w": values(*[7] * 4)})
    with pytest.raises(ValueError, match="src_strategy_path must not be None"):
        TransformParametersD2D(source, target)
    with pytest.raises(ValueError, match="dst_strategy_path must not be None"):
        TransformParametersD2D(source, target, str(paths[0]))

    def work(rank: int) -> None:
        moved = TransformParametersD2D(source, target, *map(str, paths), fits)
        for flag in ((True, False), (True,), (1, 1)):
            with pytest.raises(UsageError):
                moved.transform(flag)

    assert errors(2, work) == [None, None]


class Mesh:
    """A layout as hyper-parallel has it."""

    def __init__(self, mesh_shape: tuple[int, ...], tensor_map: Any, rank_list: Any, partial: Any = None) -> None:
        self.mesh_shape, self.tensor_map, self.rank_list, self.partial = mesh_shape, tensor_map, rank_list, partial

    def to_dict(self) -> dict[str, Any]:
        return {"mesh_shape": self.mesh_shape, "tensor_map": self.tensor_map, "rank_list": self.rank_list}


class Distributed:
    """A distributed tensor as hyper-parallel has it."""

    def __init__(self, local: Any, layout: Optional[Mesh]) -> None:
        self._local, self.layout = local, layout

    def to_local(self) -> Any:
        return self._local


def test_tensors_that_say_how_they_lie() -> None:
    """Rows over the second axis of a mesh whose ranks are in another order; columns over both axes."""
    whole = np.arange(32, dtype=np.float32).reshape(4, 8)

    def work(rank: int) -> Any:
        place = (2, 0, 3, 1).index(rank)
        rows = Mesh((2, 2), (0, -1), (2, 0, 3, 1), [None, None])
        mine = ms.Tensor(np.ascontiguousarray(whole[2 * (place % 2) : 2 * (place % 2) + 2]))
        columns = Mesh((2, 2), (-1, (1, 0)), (0, 1, 2, 3))
        taken = ms.Parameter(ms.Tensor(np.zeros((4, 2), np.float32)), name="anything")
        transfer({"w": Distributed(mine, rows)}, {"w": Distributed(taken, columns)})
        return np.array_equal(taken.asnumpy(), whole[:, 2 * rank : 2 * rank + 2])

    assert run(4, work) == [True] * 4


@pytest.mark.parametrize(
    ("layout", "kind", "said"),
    [
        (Mesh((2,), (0, -1), (0, 1), ["sum"]), StrategyError, "partial sums"),
        (Mesh((2,), (0, -1), (1, 2)), UsageError, "not in the mesh"),
        (Mesh((2,), None, (0, 1)), StrategyError, "tensor_map"),
    ],
)
def test_layouts_that_say_too_little(layout: Mesh, kind: Any, said: str) -> None:
    def work(rank: int) -> None:
        transfer({"w": Distributed(ms.Tensor(values(1, 2)), layout)}, filled({"w": values(*[0] * 4)}))

    check(errors(2, work), kind, "'w'", said)
