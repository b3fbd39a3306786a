"""What is not as it should be in a file: one kind of value, whatever found it."""

from __future__ import annotations

from typing import NamedTuple, Optional

RESTORE = "restore the file, or choose another checkpoint"


class Finding(NamedTuple):
    """Something in a file that is not what it should be, or that could not be looked at.

    Attributes:
        file: its path, or its name in a manifest.
        tensor: which one; None when it is about the file as a whole.
        found, expected: what is there, and what should be.
        offset: where the tensor's bytes begin (in the plaintext of an encrypted file).
        rank: who read it, where ranks share the reading.
        remedy: what to do.
        checked: False when it could not be looked at; `found` is why.
    """

    file: str
    tensor: Optional[str]
    found: str
    expected: str
    offset: Optional[int] = None
    rank: Optional[int] = None
    remedy: str = RESTORE
    checked: bool = True

    @property
    def reason(self) -> str:
        """What is wrong with a file, or why it was not looked at."""
        return self.found

    def __str__(self) -> str:
        what = f"{self.file!r}" if self.tensor is None else f"parameter {self.tensor!r} in {self.file!r}"
        where = [] if self.offset is None else [f"from byte {self.offset}"]
        where += [] if self.rank is None else [f"read by rank {self.rank}"]
        more = f" ({', '.join(where)})" if where else ""
        return f"{what}: found {self.found}, the manifest says {self.expected}{more}"
