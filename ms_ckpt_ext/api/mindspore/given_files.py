"""The files of a load or a re-cut: where the caller says that they are, and what is there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from ms_ckpt_ext.api.arguments import path_of
from ms_ckpt_ext.api.huggingface.adapters import adapter_of
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.source.listing import Listing, list_checkpoint, list_files
from ms_ckpt_ext.errors import ArgumentTypeError, DiscoveryError, UsageError, also
from ms_ckpt_ext.formats.registry import Access
from ms_ckpt_ext.formats.table import CKPT

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.rule import Rule
    from ms_ckpt_ext.engine.huggingface.adapter import Adapter


class GivenFiles(NamedTuple):
    """Where the files of a checkpoint are, as the caller says."""

    format: str
    filenames: Any
    directory: Any
    file_suffix: Optional[str]
    adapter: Any

    @property
    def listed(self) -> bool:
        """Whether the files were named one by one."""
        return isinstance(self.filenames, (list, tuple))

    def checked(self, trained: Optional[Strategy], access: Access) -> FilesToLoad:
        """Where to look for them. Raises UsageError, ArgumentTypeError, and as `adapter_of`."""
        found = self._checked(trained)
        return found if self.adapter is None else found._replace(adapter=adapter_of(self.adapter, access, found.path))

    def _checked(self, trained: Optional[Strategy]) -> FilesToLoad:
        if self.filenames is None:
            return FilesToLoad(path_of(self.directory, "unified_safetensors_dir"), (), trained, self)
        if self.format != CKPT.name or self.directory is not None:
            raise UsageError("checkpoint_filenames goes with format='ckpt' and without unified_safetensors_dir")
        if isinstance(self.filenames, (str, os.PathLike)):
            return FilesToLoad(path_of(self.filenames, "checkpoint_filenames"), (), trained, self)
        if not self.listed:
            given = type(self.filenames).__name__
            raise ArgumentTypeError(f"checkpoint_filenames must be a list of paths in the order of ranks, got {given}")
        paths = tuple(path_of(name, "every item of checkpoint_filenames") for name in self.filenames)
        world = 1 if trained is None else trained.world
        if len(paths) != world:
            raise UsageError(
                f"checkpoint_filenames has {len(paths)} files, but the training strategy is for {world} ranks: "
                "give the file of every rank, in the order of ranks, and train_strategy_filename"
            )
        return FilesToLoad("", paths, trained, self)


class FilesToLoad(NamedTuple):
    """Where to look for the files: below a path, or at the paths of all ranks; and an adapter that goes with them."""

    path: str
    named: tuple[str, ...]
    trained: Optional[Strategy]
    files: GivenFiles
    adapter: Optional[Adapter] = None

    def rules(self, given: tuple[Rule, ...]) -> tuple[Rule, ...]:
        """The rules of the load."""
        return given if self.adapter is None else tuple(self.adapter.among(given))

    def look(self) -> Listing:
        """The files that this host sees: hosts with local disks need not see those of others."""
        return self._listed() if self.adapter is None else self.adapter.beside(self._listed())

    def _listed(self) -> Listing:
        if not self.named:
            return list_checkpoint(self.path, self.trained, self.files.file_suffix, kind=self.files.format)
        found = {rank: path for rank, path in enumerate(self.named) if os.path.isfile(path)}
        if not found:
            raise also(DiscoveryError, FileNotFoundError)(
                f"none of the {len(self.named)} files exists, the first is {self.named[0]!r}; check the paths"
            )
        return list_files(found, self.trained)

    def require_named(self) -> None:
        """Raise DiscoveryError for a named file that is absent: for jobs in which no other host may have it."""
        for rank, path in enumerate(self.named):
            if not os.path.isfile(path):
                what = "is a directory" if os.path.isdir(path) else "does not exist"
                raise also(DiscoveryError, FileNotFoundError)(
                    f"the file of rank {rank} in checkpoint_filenames {what}: {path!r}; check it"
                )
