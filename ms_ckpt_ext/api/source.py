"""One way to name a checkpoint, whatever it is: a file, rank folders, a merged directory; plain or encrypted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, TypeVar, Union

from ms_ckpt_ext.api.arguments import PathLike, any_mode, as_strategy, checked_format, path_of, require_path
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.source.catalog import Catalog, read_listing
from ms_ckpt_ext.engine.source.listing import Listing, list_checkpoint
from ms_ckpt_ext.errors import ArgumentTypeError, UsageError
from ms_ckpt_ext.formats.registry import Access

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.rule import Rule

_Held = TypeVar("_Held")
Globs = Union[str, Iterable[str]]


class Source(NamedTuple):
    """A checkpoint that was found, its files not opened yet."""

    path: str
    listing: Listing
    strategy: Optional[Strategy]
    access: Access

    def open(self) -> Catalog:
        """Read the headers. Raises as `engine.source.catalog.catalog_of`."""
        return read_listing(self.listing, self.strategy, self.access)

    def slices(self, allow_equal_slices: bool) -> Catalog:
        """Read the headers; refuse whole parameters as slices. Raises as `engine.unlisted.whole_slices.read_slices`."""
        from ms_ckpt_ext.engine.unlisted.whole_slices import read_slices

        return read_slices(self.listing, self.strategy, self.access, allow_equal_slices)

    def ruled(self, catalog: Catalog, rules: Sequence[Rule], adapter: Optional[PathLike] = None) -> Catalog:
        """What was read of it, as weight rules present it; before they move weights, an adapter's products are added.

        Raises as `engine.unlisted.proven.ruled` and `api.huggingface.adapters.with_adapter`.
        """
        if adapter is not None:
            from ms_ckpt_ext.api.huggingface.adapters import with_adapter

            return with_adapter(catalog, rules, adapter, self.access, self.path)
        if not rules:
            return catalog
        from ms_ckpt_ext.engine.unlisted.proven import ruled

        return ruled(catalog, rules)


def find_source(
    path: Any,
    strategy: Any = None,
    file_suffix: Optional[str] = None,
    access: Optional[Access] = None,
    format: Optional[str] = None,
    argument: str = "path",
) -> Source:
    """Find the files of a checkpoint.

    Args:
        path: a checkpoint file, rank folders, a merged directory, or the index of a model in parts.
        strategy: of the job that saved rank folders, or the file of rank 0, in any form that `as_strategy` takes.
        file_suffix: which file of a rank folder; None for the newest.
        format: "safetensors" or "ckpt"; None for whichever is there.

    Raises:
        DiscoveryError: no checkpoint there, or no way to tell which files are meant.
        StrategyError: the strategy cannot be read.
    """
    path = path_of(path, argument)
    checked_format(format, "format", optional=True)
    access = any_mode(None, None) if access is None else access
    require_path(path)
    known = as_strategy(strategy, argument="strategy")
    return Source(path, list_checkpoint(path, known, file_suffix, kind=format), known, access)


class Filter:
    """Names by shell-style globs: those that match one of `match` (all, when there are none) and none of `exclude`.

    >>> wanted = Filter(match="layers.*", exclude=["*.bias"])
    >>> wanted("layers.0.weight"), wanted("layers.0.bias"), wanted("head.weight")
    (True, False, False)
    """

    def __init__(self, match: Globs = (), exclude: Globs = ()) -> None:
        self._match, self._exclude = _globs(match, "match"), _globs(exclude, "exclude")

    def __call__(self, name: str) -> bool:
        """Whether a name is wanted."""
        return (not self._match or _any(name, self._match)) and not _any(name, self._exclude)

    def __bool__(self) -> bool:
        """Whether anything is left out."""
        return bool(self._match or self._exclude)

    def of(self, tensors: Mapping[str, _Held], names: Mapping[str, str] = {}) -> dict[str, _Held]:
        """The parameters that are wanted; `names` gives the name that the globs match, where it is another."""
        return {name: tensor for name, tensor in tensors.items() if self(names.get(name, name))}

    def check(self, names: Iterable[str]) -> None:
        """Raise UsageError when none of `names` is wanted: a check of nothing would seem to pass."""
        if self and not any(map(self, names)):
            raise UsageError(
                f"no parameter is left by match {list(self._match)} and exclude {list(self._exclude)}; "
                "globs are of whole names, e.g. 'layers.0.*'"
            )


def _any(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _globs(value: Globs, argument: str) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if not all(isinstance(glob, str) for glob in found):
        raise ArgumentTypeError(f"{argument} must be a glob or several, as str")
    return found
