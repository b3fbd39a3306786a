"""The two sides of a transfer: Parameters of a Cell, or of a dictionary, and how the slices of this rank lie.

A dictionary's keys are the names that count. A distributed tensor states its own layout, see `distributed`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.bridge.match import is_parallel
from ms_ckpt_ext.bridge.transfer.distributed import local_of
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.geometry.array import BY_MINDSPORE
from ms_ckpt_ext.core.geometry.box import Box
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.engine.transfer.held import HeldSlice
from ms_ckpt_ext.errors import ArgumentTypeError, LayoutMismatchError, UnsupportedError


class SideHere(NamedTuple):
    """What one rank has of a side.

    Attributes:
        parameters: by the names that count.
        strategy: layouts; None where none are given.
        boxes: the boxes that were given, by name.
        staged: some of the Parameters in its Cell may be of other pipeline stages, and are then not cut.
    """

    parameters: Mapping[str, Any]
    strategy: Optional[Strategy] = None
    boxes: Mapping[str, Box] = MappingProxyType({})
    staged: bool = False

    def holds(self, place: int) -> dict[str, HeldSlice]:
        """What this rank holds, whose place in the layouts is `place`.

        Raises UnsupportedError: a Parameter that cannot be taken apart.
        """
        found = {}
        for name, parameter in self.parameters.items():
            layout = self.strategy.layout(name, place) if self.strategy else None
            listed = self.strategy is not None and name in self.strategy.layouts
            if name in self.boxes:
                found[name] = HeldSlice(dtype_of(name, parameter), tuple(parameter.shape), box=self.boxes[name])
            elif layout is not None:
                layout = layout.over(len(parameter.shape))
                found[name] = HeldSlice(dtype_of(name, parameter), tuple(parameter.shape), layout)
            elif not listed and not (self.staged and not parameter.sliced):
                found[name] = HeldSlice(dtype_of(name, parameter), tuple(parameter.shape))
        return found


def dtype_of(name: str, parameter: Any) -> str:
    """The element type of a Parameter, as safetensors names it. Raises UnsupportedError for packed ones."""
    known = BY_MINDSPORE.get(str(parameter.dtype))
    if known is None or known.bits % 8:
        raise UnsupportedError(
            f"parameter {name!r} is {parameter.dtype}, which a transfer cannot cut: leave it out by choice_func, or "
            "load it from a checkpoint",
            "source",
        )
    return known.name


def side_of(given: Any, argument: str) -> Optional[dict[str, Any]]:
    """The Parameters of a Cell or a dictionary, by name; None for None.

    Raises:
        ArgumentTypeError: it is neither, or a value is no Parameter.
        UnsupportedError: a MapParameter, or one with a storage format of its own.
    """
    if given is None:
        return None
    found = {}
    for name, parameter in named_parameters(given, argument):
        parameter = local_of(parameter)
        if not isinstance(parameter, ms.Tensor):
            raise ArgumentTypeError(f"{argument} must hold Parameters, got {type(parameter).__name__} for {name!r}")
        parameter = parameter if getattr(parameter, "name", "") == name else Called(parameter, name)
        if type(parameter).__name__ == "MapParameter":
            raise UnsupportedError(f"parameter {name!r} is a MapParameter, which has no slices", argument)
        storage_format = getattr(getattr(parameter, "param_info", None), "storage_format", "")
        if storage_format:
            raise UnsupportedError(
                f"parameter {name!r} is made with storage_format={storage_format!r}: its bytes are in no order that "
                "can be cut",
                argument,
            )
        found[name] = parameter
    return found


def named_parameters(given: Any, argument: str) -> Iterator[tuple[str, Any]]:
    """The names that count, and the Parameters they name. Raises ArgumentTypeError."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            if not isinstance(name, str):
                raise ArgumentTypeError(f"{argument} must map names to Parameters, got the key {name!r:.60}")
            yield name, value
        return
    if not isinstance(given, ms.nn.Cell):
        raise ArgumentTypeError(
            f"{argument} must be a mindspore.nn.Cell, a dictionary of Parameters, or None on ranks that hold no part "
            f"of it; got {type(given).__name__}"
        )
    for _, parameter in given.parameters_and_names():
        shared = parameter.param_info.is_pipeline_shared_param
        if not shared and not parameter.name.startswith(ACCUMULATED_GRADIENT_PREFIX):
            yield parameter.name, parameter


class Called:
    """A Parameter, or a Tensor, under another name than its own."""

    def __init__(self, parameter: Any, name: str) -> None:
        self.parameter, self.name = parameter, name
        self.sliced = bool(getattr(parameter, "sliced", True))

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.parameter, attribute)

    @property
    def has_init(self) -> bool:
        """Whether the data is still to be initialised; a Tensor has its data."""
        return bool(getattr(self.parameter, "has_init", False))


def plain(parameter: Any) -> Any:
    """A Parameter itself, whatever it is called here."""
    return parameter.parameter if isinstance(parameter, Called) else parameter


def check_boxes(parameters: Mapping[str, Any], boxes: Mapping[str, Box], argument: str) -> None:
    """Raise LayoutMismatchError where a box is not of the shape of this rank's Parameter."""
    for name, box in boxes.items():
        shape = None if name not in parameters else tuple(parameters[name].shape)
        if shape is not None and shape != box.shape:
            raise LayoutMismatchError(
                f"parameter {name!r} has shape {list(shape)} here, and its Box in {argument} has {list(box.shape)}"
            )


def split_boxes(given: Any, argument: str) -> tuple[Any, dict[str, Box]]:
    """The given layouts without the Boxes among them; and the Boxes, by name.

    Raises ArgumentTypeError: a Box that is not in a dictionary by name.
    """
    if isinstance(given, Mapping):
        boxes = {name: value for name, value in given.items() if isinstance(value, Box)}
        others = {name: value for name, value in given.items() if not isinstance(value, Box)}
        return (others or None) if boxes else given, boxes
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes, Box)):
        parts = [split_boxes(part, argument) for part in given]
        boxes = {name: box for _, some in parts for name, box in some.items()}
        rest = [part for part, some in parts if part is not None or not some]
        return (rest[0] if len(rest) == 1 else rest or None) if boxes else given, boxes
    if isinstance(given, Box):
        raise ArgumentTypeError(f"{argument} must name what a Box is of: {{name: Box(…)}}")
    return given, {}


def may_be_staged(given: Any, strategy: Optional[Strategy], members: int) -> bool:
    """Whether a Cell may have Parameters of other pipeline stages than that of its rank."""
    cell = isinstance(given, ms.nn.Cell) and is_parallel(given)
    return cell and strategy is not None and strategy.devices_per_stage < members
