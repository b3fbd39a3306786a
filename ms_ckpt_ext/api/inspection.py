"""The result of an inspection, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import Shape
from ms_ckpt_ext.core.geometry.describe import LayoutInfo, StrategyInfo


class FileInfo(NamedTuple):
    """A file: `rank` if its folder names one, the number of `tensors`, `encryption` if it is encrypted."""

    path: str
    size: int
    rank: Optional[int]
    tensors: int
    encryption: Optional[str]


class ParameterInfo(NamedTuple):
    """A parameter.

    Attributes:
        shape: whole; None where it is not known, because slices come without their strategy.
        nbytes: of the whole parameter; without a shape, of its slices.
        stored_nbytes: in all files together.
        slice_shapes: shapes of its slices.
        slices: number of different slices; None where that is not known.
        copies: (fewest, most) files that hold the same slice; None where that is not known. 0: a slice is missing.
        copies_expected: (fewest, most) ranks that hold the same slice in the job, by the strategy.
        layouts: of every pipeline stage that has it, when a strategy is given.
        differs: of what lies outside the strategy and is not the same on all ranks, how it differs; else "".
    """

    name: str
    dtype: str
    group: str
    shape: Optional[Shape]
    nbytes: int
    stored_nbytes: int
    slice_shapes: tuple[Shape, ...]
    slices: Optional[int]
    copies: Optional[tuple[int, int]]
    copies_expected: Optional[tuple[int, int]]
    layouts: tuple[LayoutInfo, ...] = ()
    differs: str = ""


class GroupInfo(NamedTuple):
    """Parameters of one kind: their number, their bytes when every slice counts once, and in all files together."""

    parameters: int
    nbytes: int
    stored_nbytes: int


class Redundancy(NamedTuple):
    """Copies of slices.

    Attributes:
        slices: different slices, of all parameters.
        stored: slices in the files.
        expected: slices that the ranks of the job hold.
        missing: slices that no file holds.
    """

    slices: int
    stored: int
    expected: int
    missing: int

    @property
    def replicas(self) -> str:
        """Of copies: "held" in every rank's file, "dropped" except for one, "partly dropped", or "none" in the job."""
        if self.expected == self.slices:
            return "none"
        if self.stored >= self.expected:
            return "held"
        return "dropped" if self.stored <= self.slices else "partly dropped"


class Inspection(NamedTuple):
    """What was found.

    Attributes:
        kind: "strategy", "file", "sharded", "merged", or "files" that nothing relates to each other.
        files: checkpoint files; () for a strategy.
        strategy: the one that was given or found.
        parameters: those that match the filter, by group, then by name.
        groups: sums over them.
        scalars: what lies outside the strategy and has at most one axis, also single elements, with contents where
            they are small and readable; where ranks differ, rank -> contents.
        redundancy: None where it is not known.
    """

    path: str
    kind: str
    files: tuple[FileInfo, ...]
    strategy: Optional[StrategyInfo]
    parameters: tuple[ParameterInfo, ...]
    groups: Mapping[str, GroupInfo]
    scalars: Mapping[str, Any]
    redundancy: Optional[Redundancy]
