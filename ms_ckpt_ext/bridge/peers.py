"""A resume in which some ranks lost what their Parameters held, and others still have it.

Collective: every rank takes part, with the same layouts.

1. Every rank says whether its Parameters are good, and of which step of the training they are.
2. What a rank lost and another still holds is planned as a transfer.
3. What no rank holds any more is read from the newest checkpoint, which must be of the same step: nothing is mixed.
4. The transfer is run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Callable, NamedTuple, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge.request import LoadRequest, half_done
from ms_ckpt_ext.bridge.restore import Resumed, fill_chosen, with_lacks
from ms_ckpt_ext.bridge.together import meeting
from ms_ckpt_ext.bridge.transfer.asked import TransferRequest
from ms_ckpt_ext.bridge.transfer.moving import PlannedMove
from ms_ckpt_ext.bridge.transfer.planned import Sides, plan_between
from ms_ckpt_ext.bridge.transfer.sides import SideHere, may_be_staged, side_of
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.engine.resume.newest import Chosen, ResumeRequest, Skipped, choose_checkpoint
from ms_ckpt_ext.errors import DiscoveryError, LayoutMismatchError, LoadError, UsageError, name_ranks, some
from ms_ckpt_ext.transport.agree import NATURAL, WHOLE, Maybe, agree, on_all, told_by_all
from ms_ckpt_ext.transport.base import Transport

_STEPS = ("step_num", "global_step")
"""Parameters in which callbacks and optimizers keep the step, as checkpoints do."""

StepOf = Callable[[Chosen], Optional[int]]


class Alive(NamedTuple):
    """What a rank says about itself.

    Attributes:
        good: its Parameters hold what the training made of them.
        step: of which step they are; None to ask the network.
    """

    good: bool
    step: Optional[int] = None


class PeersResumed(NamedTuple):
    """What came from where, on this rank.

    Attributes:
        resumed: what was read from a checkpoint; None if nothing was.
        skipped: newer checkpoints that were passed over.
        step: that of the ranks whose Parameters are good; None where there are none.
        received: bytes that this rank received from them.
    """

    resumed: Optional[Resumed]
    skipped: tuple[Skipped, ...]
    step: Optional[int]
    received: int = 0


def fill_with_peers(request: LoadRequest, wanted: ResumeRequest, alive: Alive, step_of: StepOf) -> PeersResumed:
    """Give the ranks that lost the contents of their Parameters the same contents again.

    Args:
        step_of: gives the step of a checkpoint; None where it does not say.

    Raises:
        UsageError: a rank's Parameters are good, and nothing says of which step.
        LayoutMismatchError: good Parameters are of different steps, or the checkpoint is of another step than they are.
        DiscoveryError: something is lost everywhere, and there is no complete checkpoint.
        LoadError: it stopped on the way; good Parameters are as they were.
        Others as `restore.fill_newest`.
    """
    with meeting(request.options.timeout) as transport:
        agree(transport, wanted.facts())
        step = _common_step(transport, request.network, alive)
        if step is None:
            log.warning("the Parameters of no rank are good: everything is read from the checkpoint")
            chosen, skipped = choose_checkpoint(transport, with_lacks(wanted, request))
            return PeersResumed(None if chosen is None else fill_chosen(transport, request, chosen), skipped, None)
        planned = _plan(transport, request, alive)
        lost: list[list[str]] = told_by_all(transport, lambda: [] if alive.good else planned.report.missing, [str])
        resumed, skipped = _read_lost(transport, request, wanted, lost, step, step_of) if any(lost) else (None, ())
        _run(planned, lost[transport.rank], resumed)
        _tell(transport, planned.report.bytes_received, resumed)
        return PeersResumed(resumed, skipped, step, planned.report.bytes_received)


def _run(planned: PlannedMove, lost: Sequence[str], resumed: Optional[Resumed]) -> None:
    """Run the transfer, after what this rank `lost` was read. Raises LoadError, which names that as well."""
    try:
        planned.run()
    except Exception as error:
        if resumed is None:
            raise
        moved, cause = (error.changed, error.__cause__) if isinstance(error, LoadError) else ((), error)
        assert isinstance(cause, Exception)
        raise half_done(cause, [*lost, *moved], "resume", "resume again") from error


def _common_step(transport: Transport[Any], network: Any, alive: Alive) -> Optional[int]:
    """The step of all ranks whose Parameters are good; None where there are none."""

    def look() -> Optional[int]:
        return _own_step(network, alive) if alive.good else None

    told: list[Optional[int]] = told_by_all(transport, look, Maybe(WHOLE))
    steps: dict[int, list[int]] = {}
    for rank, step in enumerate(told):
        if step is not None:
            steps.setdefault(step, []).append(rank)
    if len(steps) > 1:
        raise LayoutMismatchError(
            "the ranks whose Parameters are good are of different steps ("
            + "; ".join(f"{name_ranks(ranks)}: step {step}" for step, ranks in sorted(steps.items()))
            + "): nothing was changed; say alive=False on those that are behind, or load all from the checkpoint, "
            "without `alive`"
        )
    return next(iter(steps), None)


def _own_step(network: Any, alive: Alive) -> int:
    if alive.step is not None:
        return alive.step
    held = {parameter.name: parameter for _, parameter in network.parameters_and_names()}
    found = {name: int(held[name].asnumpy().reshape(-1)[0]) for name in _STEPS if name in held}
    if len(set(found.values())) != 1:
        told = f"its Parameters contradict each other ({found})" if found else f"it has no Parameter {_STEPS}"
        raise UsageError(f"alive=True, and the network does not say of which step: {told}; give alive_step")
    return next(iter(found.values()))


def _plan(transport: Transport[Any], request: LoadRequest, alive: Alive) -> PlannedMove:
    """The transfer to the ranks that lost something, without what is lost everywhere."""
    ranks = range(transport.size)
    side = on_all(transport, lambda: _side(request, transport.size))
    asked = TransferRequest(None, None, _no_layouts, strict=False, exact=True, options=request.options)
    sides = Sides(side if alive.good else None, ranks, None if alive.good else side, ranks, partial=True)
    return plan_between(transport, asked, sides)


def _side(request: LoadRequest, world: int) -> SideHere:
    found = side_of(request.network, "network")
    assert found is not None
    return SideHere(found, request.target, staged=may_be_staged(request.network, request.target, world))


def _no_layouts(_given: Any, _place: int, _argument: str) -> None:
    """Both sides are known."""


def _read_lost(
    transport: Transport[Any],
    request: LoadRequest,
    wanted: ResumeRequest,
    lost: Sequence[Collection[str]],
    step: int,
    step_of: StepOf,
) -> tuple[Resumed, tuple[Skipped, ...]]:
    """Read what no rank holds. `lost`: names of Parameters, by rank."""
    mine = request._replace(network=_Part(request.network, lost[transport.rank]))
    chosen, skipped = choose_checkpoint(transport, with_lacks(wanted, mine))
    names = sorted({name for each in lost for name in each})
    losers = name_ranks([rank for rank, each in enumerate(lost) if each])
    told = f"{len(names)} parameters that {losers} lost are held by no rank whose Parameters are good ({some(names)})"
    if chosen is None:
        raise DiscoveryError(f"{told}, and {wanted.directory!r} holds no complete checkpoint to read them from")
    found = step_of(chosen)
    if found != step:
        raise LayoutMismatchError(
            f"{told}; good Parameters are of step {step}, and the checkpoint {chosen.candidate.title!r} "
            f"{'does not tell its step' if found is None else f'is of step {found}'}: nothing is mixed, and nothing "
            "was changed; load all from the checkpoint, without `alive`"
        )
    return fill_chosen(transport, mine, chosen), skipped


class _Part(ms.nn.Cell):
    """A network of which some Parameters are to be filled."""

    def __init__(self, network: Any, names: Collection[str]) -> None:
        super().__init__(auto_prefix=False)
        self.network, self._names = network, frozenset(names)

    def parameters_and_names(self, name_prefix: str = "", expand: bool = True) -> Iterator[tuple[str, Any]]:
        """As for a Cell, but only those to be filled."""
        for name, parameter in self.network.parameters_and_names(name_prefix, expand):
            if parameter.name in self._names:
                yield name, parameter


def _tell(transport: Transport[Any], received: int, resumed: Optional[Resumed]) -> None:
    """Log how many bytes came from where."""
    mine = (received, resumed.filled.report.reads.nbytes if resumed else 0)
    told: list[list[int]] = told_by_all(transport, lambda: mine, (NATURAL, NATURAL))
    log.info(
        "this rank took %d bytes from ranks whose Parameters are good and read %d from files; all ranks %d and %d",
        *mine,
        *(sum(column) for column in zip(*told)),
    )
