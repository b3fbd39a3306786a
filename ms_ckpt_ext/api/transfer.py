"""Parameters of one network into those of another under any other layout, without storage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional

from ms_ckpt_ext.api.arguments import as_strategy, checked_flags, checked_naming, checked_rules
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.transfer.report import TransferReport
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError, integer

if TYPE_CHECKING:
    from ms_ckpt_ext.bridge.transfer.asked import TransferRequest
    from ms_ckpt_ext.bridge.transfer.moving import PlannedMove
    from ms_ckpt_ext.core.planning.rule import Rule
    from ms_ckpt_ext.engine.source.renaming import Choice


def transfer(source: Any, target: Any, **how: Any) -> TransferReport:
    """Fill the Parameters of `target` with what those of `source` hold, under whatever layouts the two have.

    Collective: every rank of the job calls it. The ranks that hold the source and those that hold the target may be the
    same, overlap, or be others. Bytes go from device to device; what a rank holds already does not travel. All ranks
    agree before anything moves, and an error on one is raised on all.

    Args:
        source, target: a Cell, or a dictionary of Parameters by name; None on ranks that hold no part of it.
        **how: see `plan_transfer`.

    Returns:
        What was moved on this rank.

    Raises:
        as `plan_transfer` and `TransferPlan.run`.
    """
    with plan_transfer(source, target, **how) as plan:
        return plan.run()


def plan_transfer(
    source: Any,
    target: Any,
    *,
    source_strategy: Any = None,
    target_strategy: Any = None,
    source_ranks: Optional[Iterable[int]] = None,
    target_ranks: Optional[Iterable[int]] = None,
    name_map: Optional[Mapping[str, str]] = None,
    choice_func: Optional[Choice] = None,
    rules: Optional[Sequence[Rule]] = None,
    strict: bool = True,
    verify: str = "none",
    offload_source: bool = False,
    load_target: bool = False,
    bucket_bytes: Optional[int] = None,
    timeout: float = 600.0,
    hardware: str = "",
) -> TransferPlan:
    """Plan a transfer that is run again and again, after every training step for instance. Collective.

    Args:
        source, target: as in `transfer`.
        source_strategy, target_strategy: layouts, in any form that `load_distributed_checkpoint` takes for
            `predict_strategy`; or `{name: Box(global_shape, offsets, shape)}`, what this rank holds. By default those
            of the Cell; a dictionary holds whole Parameters, and distributed tensors, which know their own layout.
        source_ranks, target_ranks: the ranks of each side, the first of which has place 0 in its layouts. By default
            those whose argument is not None, ascending.
        name_map: name in the target -> name in the source, as `choice_func` left it.
        choice_func: name in the source -> True (move it), False (leave it) or a str (new name).
        rules: weight rules (`ms_ckpt_ext.rules`) that make the target's Parameters from the source's.
        strict: every Parameter of the target must take something, by its exact name, unless `choice_func` leaves it
            out. Otherwise names also match by suffix, as in a load, and a Parameter without a source keeps its values.
            Dtypes are cast within floats and within ints either way.
        verify: "replicas": after every run compare digests of the same region on several ranks of the target. "full":
            compare what every rank took with what all ranks of the source hold of it, at the cost of one more pass over
            every byte of both, on the host; not with rules that compute.
        offload_source: offload the source's Parameters to host memory after every run (Ascend).
        load_target: bring the target's Parameters to the device before every run (Ascend).
        bucket_bytes, timeout, hardware: see `ms_ckpt_ext.engine.load.options.LoadOptions`.

    Returns:
        The plan, to be used in a `with` statement or closed: `run()` moves the values that the Parameters hold then,
        and `report` says what a run moves.

    Raises:
        UsageError, ArgumentTypeError, UnsupportedError, StrategyError: wrong arguments.
        CoverageError: the source lacks a Parameter, or a region of one; names it, and the ranks.
        LayoutMismatchError: layouts contradict each other, or shapes or dtypes do not fit.
        DisagreementError, PeerError, TransportError: ranks differ in their inputs, another rank failed, or is gone.
    """
    from ms_ckpt_ext.bridge.transfer.asked import TransferRequest, given_side
    from ms_ckpt_ext.engine.source.renaming import Naming

    checked_flags(strict=strict, offload_source=offload_source, load_target=load_target)
    return TransferPlan(
        TransferRequest(
            given_side(source, source_strategy),
            given_side(target, target_strategy),
            as_strategy,
            _ranks(source_ranks, "source_ranks"),
            _ranks(target_ranks, "target_ranks"),
            bool(strict),
            checked_rules(() if rules is None else rules),
            checked_naming(choice_func, name_map) or Naming(),
            offload_source=bool(offload_source),
            load_target=bool(load_target),
            options=LoadOptions(bucket_bytes=bucket_bytes, verify=verify, timeout=timeout, hardware=hardware),
        )
    )


class TransferPlan:
    """A transfer that was planned: `run` moves the current values, as often as wanted. Made by `plan_transfer`.

    To be closed, or used in a `with` statement: it holds connections to the other ranks, and staging memory.

    Attributes:
        report: what every run moves on this rank.
    """

    def __init__(self, request: TransferRequest) -> None:
        from ms_ckpt_ext.bridge.transfer.planned import plan_move, transport_among

        transport = transport_among(request.options.timeout)
        try:
            self._move: Optional[PlannedMove] = plan_move(transport, request)
        except BaseException:
            transport.close()
            raise
        self.report: TransferReport = self._move.report

    def run(self, *, offloaded: bool = False) -> TransferReport:
        """Move what the source's Parameters hold now. Collective.

        Nothing is planned, and after the first run nothing is allocated.

        Args:
            offloaded: the Parameters of both sides are in host memory: they are brought to the device, and
                offloaded again (Ascend).

        Returns:
            What was moved on this rank.

        Raises:
            UsageError: the plan is closed; or Parameters of both sides share memory; nothing was moved.
            LoadError: it stopped on the way; `changed` names the Parameters of this rank that may hold new bytes.
            PeerError, TransportError: another rank refused, or is gone.
        """
        if self._move is None:
            raise UsageError("the plan is closed: make a new one by plan_transfer")
        return self._move.run(offloaded)

    def close(self) -> None:
        """Free the staging memory, and disconnect from the other ranks. May be called twice."""
        move, self._move = self._move, None
        if move is not None:
            move.close()

    def __enter__(self) -> TransferPlan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ranks(given: Optional[Iterable[int]], argument: str) -> Optional[tuple[int, ...]]:
    if given is None:
        return None
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ArgumentTypeError(f"{argument} must be ranks, got {given!r:.60}")
    return tuple(integer(rank, f"every item of {argument}", 0) for rank in given)
