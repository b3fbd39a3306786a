"""What a transfer refuses, by name and on all ranks, and what it does with odd sides."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest

from ms_ckpt_ext import Box, plan_transfer, rules, transfer
from ms_ckpt_ext.errors import (
    ArgumentTypeError,
    CoverageError,
    DisagreementError,
    LayoutMismatchError,
    PeerError,
    StrategyError,
    UsageError,
)
from tests.bridge.transfer.test_cells import errors, filled, run
from tests.support.cells import HERE, threads  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("threads")
ROWS = {"w": ((2,), (0, -1))}


def values(*rows: float, dtype: Any = np.float32) -> np.ndarray:
    return np.repeat(np.array(rows, dtype)[:, None], 3, 1)


def array_of(made: Any, name: str) -> np.ndarray:
    (found,) = (p for p in made.get_parameters() if p.name == name)
    return np.array(found.asnumpy())


def check(found: list[Any], kind: type[BaseException], *said: str) -> None:
    """All ranks raise, the one that knows as `kind`, the others as that or as PeerError."""
    assert all(isinstance(error, (kind, PeerError)) for error in found), found
    assert any(isinstance(error, kind) for error in found), found
    assert all(text in str(error) for error in found for text in said), [str(error) for error in found]


def test_a_parameter_of_both_sides_stays() -> None:
    def work(rank: int) -> bool:
        shared = filled({"w": values(rank, rank)})
        target = {"w": shared.p0, "whole": ms.Parameter(ms.Tensor(values(9, 9, 9, 9)), name="other")}
        report = transfer(
            shared, target, source_strategy=ROWS, target_strategy={"w": ((2,), (0, -1)), "whole": ((2,), (-1, -1))},
            name_map={"whole": "w"},
        )  # fmt: skip
        assert report.bytes_received == 24
        assert np.array_equal(target["whole"].asnumpy(), values(0, 0, 1, 1))
        return bool(np.array_equal(shared.p0.asnumpy(), values(rank, rank)))

    assert all(run(2, work))


def test_memory_of_both_sides_is_refused() -> None:
    def work(rank: int) -> None:
        source = {"w": ms.Parameter(ms.Tensor(values(1, 2)), name="w")}
        target = {"w": source["w"]}
        cuts = {"source_strategy": {"w": Box((4, 3), (2 * rank, 0), (2, 3))}}
        transfer(source, target, **cuts, target_strategy={"w": Box((4, 3), (2 - 2 * rank, 0), (2, 3))})

    check(errors(2, work), UsageError, "'w' of the source", "share memory")


def test_one_parameter_under_two_names_is_refused() -> None:
    def work(rank: int) -> None:
        one = ms.Parameter(ms.Tensor(values(0, 0)), name="x")
        transfer(filled({"a": values(1, 2), "b": values(3, 4)}), {"a": one, "b": one})

    check(errors(1, work), UsageError, "share memory")


def test_what_no_layout_lists_is_alike_or_refused() -> None:
    def work(rank: int, seed: int, **how: Any) -> Any:
        source = filled({"w": values(rank, rank), "seed": np.array(seed, np.int64)})
        target = filled({"w": values(7, 7, 7, 7), "seed": np.array(99, np.int64)})
        transfer(source, target, source_strategy=ROWS, **how)
        return int(array_of(target, "seed")), array_of(target, "w").tolist()

    truth = values(0, 0, 1, 1).tolist()
    assert run(2, lambda rank: work(rank, 5)) == [(5, truth)] * 2
    check(errors(2, lambda rank: work(rank, rank)), LayoutMismatchError, "'seed'", "different contents")
    left = run(2, lambda rank: work(rank, rank, choice_func=lambda name: name != "seed"))
    assert left == [(99, truth)] * 2


def test_slices_that_nobody_called_slices_are_no_copies() -> None:
    def work(rank: int) -> None:
        transfer(filled({"w": values(rank, rank)}), filled({"w": values(7, 7)}))

    check(errors(2, work), LayoutMismatchError, "'w'", "different contents")


def test_what_is_missing() -> None:
    def work(rank: int, **how: Any) -> Any:
        source, target = filled({"w": values(1, 2)}), filled({"w": values(7, 7), "bias": values(5)})
        report = transfer(source, target, **how)
        return report.missing, array_of(target, "bias").tolist()

    check(errors(2, lambda rank: work(rank)), CoverageError, "'bias'")
    assert run(2, lambda rank: work(rank, strict=False)) == [(("bias",), values(5).tolist())] * 2


def test_regions_that_no_rank_holds() -> None:
    def work(rank: int) -> None:
        box = Box((6, 3), (2 * rank, 0), (2, 3))
        transfer(
            {"w": ms.Parameter(ms.Tensor(values(1, 2)), name="w")} if rank < 2 else None,
            {"w": ms.Parameter(ms.Tensor(values(*[0] * 6)), name="w")} if rank == 2 else None,
            source_strategy={"w": box} if rank < 2 else None,
        )

    check(errors(3, work), CoverageError, "'w'", "[0:6, 0:3]", "rank 2")


@pytest.mark.parametrize(
    ("boxes", "kind", "said"),
    [
        ([((5, 3), (0, 0), (2, 3)), ((5, 3), (2, 0), (2, 3))], CoverageError, "12 of the 15"),
        ([((5, 3), (0, 0), (3, 3)), ((5, 3), (2, 0), (3, 3))], LayoutMismatchError, "overlap"),
        ([((5, 3), (0, 0), (3, 3)), ((6, 3), (3, 0), (3, 3))], LayoutMismatchError, "full shape"),
    ],
)
def test_boxes_that_make_no_parameter(boxes: Any, kind: Any, said: str) -> None:
    def work(rank: int) -> None:
        box = Box(*boxes[rank])
        made = {"w": ms.Parameter(ms.Tensor(np.zeros(box.shape, np.float32)), name="w")}
        target = {"w": ms.Parameter(ms.Tensor(np.zeros((5, 3), np.float32)), name="w")}
        transfer(made, target, source_strategy={"w": box})

    check(errors(2, work), kind, "'w'", said)


def test_casts() -> None:
    def work(rank: int, dtype: Any) -> Any:
        target = {"w": ms.Parameter(ms.Tensor(np.zeros((4, 3)), dtype), name="w")}
        transfer(filled({"w": values(rank, rank + 0.5)}), target, source_strategy=ROWS)
        return target["w"].astype(ms.float32).asnumpy().tolist()

    truth = values(0, 0.5, 1, 1.5).tolist()
    assert run(2, lambda rank: work(rank, ms.bfloat16)) == [truth] * 2
    check(errors(2, lambda rank: work(rank, ms.int32)), LayoutMismatchError, "'w'", "within floats")


def test_names_and_rules() -> None:
    def work(rank: int) -> Any:
        source = filled({"gate": values(rank, rank), "up": values(rank + 10, rank + 10), "old.bias": values(3)})
        target = filled({"gate_up": values(*[7] * 8), "bias": values(7), "same": values(7)})
        transfer(
            source, target, source_strategy={"gate": ((2,), (0, -1)), "up": ((2,), (0, -1))},
            rules=[rules.Interleave(["gate", "up"], "gate_up")],
            choice_func=lambda name: name.replace("old.", ""), name_map={"same": "bias"},
        )  # fmt: skip
        return [array_of(target, name)[:, 0].tolist() for name in ("gate_up", "bias", "same")]

    assert run(2, work) == [[[0, 10, 0, 10, 1, 11, 1, 11], [3], [3]]] * 2


def test_ranks_are_named_or_found() -> None:
    def work(rank: int, give: list[int], **how: Any) -> Any:
        source = filled({"w": values(rank, rank)}) if rank in (1, 3) else None
        target = filled({"w": values(7, 7)}) if rank in (0, 1) else None
        cut = {"source_strategy": ROWS if rank in give else None, "target_strategy": ROWS if target else None}
        transfer(source, target, **cut, **how)
        return None if target is None else float(array_of(target, "w")[0, 0])

    assert run(4, lambda rank: work(rank, [1, 3])) == [1.0, 3.0, None, None]
    assert run(4, lambda rank: work(rank, [1, 3], source_ranks=[3, 1])) == [3.0, 1.0, None, None]
    assert run(4, lambda rank: work(rank, [1, 3], target_ranks=(1, 0))) == [3.0, 1.0, None, None]
    check(errors(4, lambda rank: work(rank, [1, 3], source_ranks=[0, 1])), UsageError, "source_ranks names rank 0")
    check(errors(4, lambda rank: work(rank, [1, 3], source_ranks=[1, 9])), UsageError, "below 4")
    alone = errors(4, lambda rank: work(rank, [1, 3], source_ranks=[1]))
    check(alone, StrategyError, "source_strategy is for 2 ranks, and the source has 1")
    check(errors(2, lambda rank: transfer(None, filled({"w": values(1)}))), UsageError, "`source` is None on all ranks")
    differing = errors(2, lambda rank: transfer(filled({"w": values(1)}), None, strict=rank == 0))
    check(differing, DisagreementError, "strict")


def test_arguments() -> None:
    made = filled({"w": values(1, 2)})
    for wrong, kind in (({"source": 3}, ArgumentTypeError), ({"source": {"w": 3}}, ArgumentTypeError),
                        ({"strict": 2}, ArgumentTypeError), ({"verify": "some"}, UsageError),
                        ({"source_ranks": 3}, ArgumentTypeError), ({"rules": [3]}, ArgumentTypeError),
                        ({"source_strategy": Box((2, 3), (0, 0), (2, 3))}, ArgumentTypeError),
                        ({"source_strategy": {"w": Box((4, 3), (0, 0), (4, 3))}}, LayoutMismatchError)):  # fmt: skip
        (error,) = errors(1, lambda rank, wrong=wrong: transfer(**{"source": made, "target": {}, **wrong}))
        assert isinstance(error, kind), (wrong, error)


def test_a_plan_is_closed_once() -> None:
    def work(rank: int) -> None:
        plan = plan_transfer(filled({"w": values(1)}), filled({"w": values(0)}))
        plan.run()
        plan.close()
        plan.close()
        with pytest.raises(UsageError, match="closed"):
            plan.run()

    assert errors(2, work) == [None, None]


def test_a_hundred_runs_allocate_once() -> None:
    def work(rank: int) -> tuple[int, int]:
        sizes: list[int] = []
        allocate = HERE.transport.allocate
        HERE.transport.allocate = lambda nbytes: (sizes.append(nbytes), allocate(nbytes))[1]
        source, target = filled({"w": np.full((64, 64), rank, np.float32)}), filled({"w": values(*[7] * 128)[:, :1]})
        target = filled({"w": np.zeros((128, 64), np.float32)})
        with plan_transfer(source, target, source_strategy=ROWS) as plan:
            plan.run()
            first = len(sizes)
            for number in range(100):
                source.p0.asnumpy()[:] = number + rank
                plan.run()
                assert array_of(target, "w")[::64, 0].tolist() == [number, number + 1]
        return first, len(sizes)

    for first, last in run(2, work):
        assert 0 < first == last
