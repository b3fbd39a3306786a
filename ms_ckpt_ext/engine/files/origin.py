"""Whose a file in a target is: a result of this package, which another may replace, or somebody else's."""

from __future__ import annotations

from pathlib import Path

from ms_ckpt_ext.storage import journal
from ms_ckpt_ext.storage.hidden import HiddenFolder
from ms_ckpt_ext.storage.published import Published, places_of, read_published, state_of


class Records:
    """What is on record as published by this package, in any folder; each record is read once.

    A record is that of the folder of a job's target, so a file is looked for in its own folder's and in those further
    up. What an interrupted job was about to publish counts as well: whoever comes next finishes that.
    """

    def __init__(self) -> None:
        self._read: dict[str, tuple[Published, set[str]]] = {}

    def holds(self, folder: str, name: str) -> bool:
        """Whether a file in a folder is as it was published."""
        path = Path(folder, name)
        state = state_of(path)
        for above, begins in places_of(str(path.parent)):
            published, begun = self._of(above)
            if published.is_as_published(begins + path.name, state) or begins + path.name in begun:
                return True
        return False

    def names(self, folder: str) -> set[str]:
        """Files below a folder that are on its record, or about to be."""
        published, begun = self._of(folder)
        return published.files.keys() | begun

    def _of(self, folder: str) -> tuple[Published, set[str]]:
        if folder not in self._read:
            begun = map(journal.read_journal, HiddenFolder(Path(folder)).journals())
            self._read[folder] = read_published(Path(folder)), {name for each in begun if each for name in each.files}
        return self._read[folder]
