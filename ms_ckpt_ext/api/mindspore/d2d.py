"""MindSpore RLHF's class that moves weights from the training network to the serving one, by `plan_transfer`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional

from ms_ckpt_ext.api.arguments import PathLike, as_strategy, checked_flags, path_of
from ms_ckpt_ext.api.transfer import TransferPlan
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError, some

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.source.renaming import Naming

MatchFunc = Callable[[str, str], bool]


class TransformParametersD2D:
    """Parameters of a source network into those of a destination network, device to device.

    Drop-in for the class of this name in mindrlhf. Unlike there, the networks may run on different numbers of devices,
    on different ranks (None where a rank has no part), and with any pipeline on either side; what ranks hold already
    does not travel. Creating the object plans the transfer, a collective call; `transform` plans nothing.

    Args:
        src_network: the Cell that gives.
        dst_network: the Cell that takes. Parameters that match nothing keep their values, and the log says so.
        src_strategy_path, dst_strategy_path: the merged strategy files; any form that `plan_transfer` takes.
        match_func: (name in the source, name in the destination) -> whether they belong together; asked for every pair
            until one fits. By default names must be equal.
        offload_src: offload the source's Parameters after each transformation.
        load_dst: bring the destination's to the device before it.
        reshard_mode: taken for compatibility; there is one way.

    Raises:
        UsageError (a ValueError): no strategy, nothing that matches, or two sources match one destination.
        ArgumentTypeError (a TypeError): match_func returns something other than a bool.
        others: as `plan_transfer`.
    """

    def __init__(
        self,
        src_network: Any,
        dst_network: Any,
        src_strategy_path: Optional[PathLike] = None,
        dst_strategy_path: Optional[PathLike] = None,
        match_func: Optional[MatchFunc] = None,
        offload_src: bool = False,
        load_dst: bool = False,
        *,
        reshard_mode: int = 0,
    ) -> None:
        given = {"src_strategy_path": src_strategy_path, "dst_strategy_path": dst_strategy_path}
        for argument, value in given.items():
            if value is None:
                raise UsageError(f"{argument} must not be None: give the merged strategy file of the network")
            if isinstance(value, str):
                path_of(value, argument)
        if match_func is not None and not callable(match_func):
            raise ArgumentTypeError(f"match_func must be callable, got {type(match_func).__name__}")
        checked_flags(offload_src=offload_src, load_dst=load_dst)

        from ms_ckpt_ext.bridge.transfer.asked import TransferRequest, given_side

        def pairs(sources: Sequence[str], targets: Sequence[str]) -> Naming:
            return _naming(match_func, sources, targets)

        request = TransferRequest(
            given_side(src_network, src_strategy_path),
            given_side(dst_network, dst_strategy_path),
            as_strategy,
            strict=False,
            exact=True,
            pairs=pairs,
            offload_source=bool(offload_src),
            load_target=bool(load_dst),
        )
        self._networks = src_network, dst_network
        self._plan = TransferPlan(request)
        weakref.finalize(self, self._plan.close)

    def transform(self, input_on_device_flag: tuple[bool, bool] = (True, True)) -> bool:
        """Move the current values. Collective.

        Args:
            input_on_device_flag: (False, False) where the Parameters of both networks were offloaded: they are brought
                to the device for it, and offloaded again.

        Returns:
            True.

        Raises:
            UsageError, ArgumentTypeError: another flag.
            others: as `TransferPlan.run`.
        """
        if not isinstance(input_on_device_flag, tuple) or len(input_on_device_flag) != 2:
            raise UsageError(f"input_on_device_flag must be a tuple of two, got {input_on_device_flag!r:.60}")
        checked_flags(**{f"input_on_device_flag[{n}]": flag for n, flag in enumerate(input_on_device_flag)})
        source, target = input_on_device_flag
        if source != target:
            raise UsageError(f"input_on_device_flag must be (True, True) or (False, False), got {input_on_device_flag}")
        self._plan.run(offloaded=not source)
        return True

    def close(self) -> None:
        """Free the staging memory, and disconnect from the other ranks; also done when the object is deleted."""
        self._plan.close()


def _naming(match_func: Optional[MatchFunc], sources: Sequence[str], targets: Sequence[str]) -> Naming:
    """What the sources are called in the destination; those that match nothing are left out."""
    from ms_ckpt_ext.engine.source.renaming import Naming

    found: dict[str, str] = {}
    for source in sources:
        target = next((target for target in targets if _fits(match_func, source, target)), None)
        if target is not None:
            found[source] = target
    if not found:
        raise UsageError(
            f"no parameter of the source ({some(sources)}) matches one of the destination ({some(targets)}): check the "
            "names, or match_func"
        )
    taken: dict[str, str] = {}
    for source, target in found.items():
        if taken.setdefault(target, source) != source:
            raise UsageError(f"match_func gives {target!r} two sources, {taken[target]!r} and {source!r}")
    return Naming(lambda name: found.get(name, False))


def _fits(match_func: Optional[MatchFunc], source: str, target: str) -> bool:
    if match_func is None:
        return source == target
    answer = match_func(source, target)
    if not isinstance(answer, bool):
        raise ArgumentTypeError(
            f"match_func must return a bool, but returned {type(answer).__name__} for {source!r} and {target!r}"
        )
    return answer
