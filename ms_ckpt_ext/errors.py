"""Every error this package raises on purpose.

    CheckpointError                 the root: `except CheckpointError` catches all of them
    ├── UsageError                  an argument is wrong: fix the call                     (also a ValueError)
    │   ├── ArgumentTypeError       an argument has the wrong type                         (also a TypeError)
    │   ├── MissingNameError        a dictionary lacks a parameter                         (also a KeyError)
    │   └── UnsupportedError        stock MindSpore takes this value of an argument, this package does not
    ├── MissingDependencyError      an optional package is needed and absent               (also an ImportError)
    ├── DiscoveryError              no file, several equally good ones, or those of several steps, where one is needed
    │                                                                                        (also a ValueError)
    ├── FormatError                 a file does not follow its format: path and offset     (also a ValueError)
    │   ├── TruncatedFileError      the file ends before its own header says it should
    │   ├── ChecksumError           the bytes are not those that were written
    │   ├── MapParameterError       the file holds a hash table, which has no shape to cut
    │   └── DecryptionError         wrong key, or an altered encrypted file
    ├── StrategyError               a strategy file is unreadable or contradicts itself    (also a ValueError)
    ├── LayoutMismatchError         slices, strategy and network disagree on a name, a shape or a dtype
    │                                                                     (also a ValueError and a RuntimeError)
    ├── CoverageError               no source holds a region that a target needs           (also a ValueError)
    ├── StorageError                the operating system refused a read, a write, or memory
    │                                                           (also an OSError; for lack of memory a MemoryError, too)
    │   └── ReadError               a file of a checkpoint cannot be read                  (also a ValueError)
    ├── LoadError                   a network could not be filled; says what was already changed (also a RuntimeError)
    └── TransportError              ranks could not exchange                               (also a RuntimeError)
        ├── PeerError               another rank failed: its rank and its message
        └── DisagreementError       ranks were started with different inputs: which ones, and what differs

The built-in bases are what stock MindSpore raises in the same place, so existing `except` clauses keep working. Where
it raises an error of the operating system, such as NotADirectoryError, ours is one as well: see `also`.
A message says what happened, where (parameter, rank, file, offset), what was expected and what to do next. Its text
is where it is raised: search the package for a few of its words.

Below the errors are the functions that make messages, and the checks of single arguments that all rooms share.
"""

from __future__ import annotations

import errno
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Optional, TypeVar, cast

Kind = TypeVar("Kind", bound="CheckpointError")


class CheckpointError(Exception):
    """Root of the tree above. Its text tells names apart that look alike: see `spelled`."""

    def __str__(self) -> str:
        return spelled(super().__str__())


class UsageError(CheckpointError, ValueError):
    """An argument is wrong; nothing was read or written."""


class ArgumentTypeError(UsageError, TypeError):
    """An argument has the wrong type; nothing was read or written."""


class MissingNameError(UsageError, KeyError):
    """A dictionary lacks a parameter that it was asked for."""

    def __str__(self) -> str:
        return spelled(Exception.__str__(self))


class UnsupportedError(UsageError):
    """A legal call that stock MindSpore serves and this package does not; `argument` names what it cannot take."""

    def __init__(self, message: str, argument: str) -> None:
        super().__init__(message)
        self.argument = argument


class MissingDependencyError(CheckpointError, ImportError):
    """A package that this call needs is not installed; the message says how to install it."""


class DiscoveryError(CheckpointError, ValueError):
    """A checkpoint directory lacks a file, or holds several equally good ones."""


class FormatError(CheckpointError, ValueError):
    """The bytes of a file do not follow its format."""


class TruncatedFileError(FormatError):
    """A file is shorter than its header says."""


class ChecksumError(FormatError):
    """Stored and computed checksums differ."""


class MapParameterError(FormatError):
    """A file holds a MapParameter, a hash table, which has no shape to cut."""


class DecryptionError(FormatError):
    """A wrong key, or an encrypted file that was altered."""


class StrategyError(CheckpointError, ValueError):
    """A strategy file cannot be read, or contradicts itself."""


class LayoutMismatchError(CheckpointError, ValueError, RuntimeError):
    """Slices, strategy and network disagree on a name, a shape or a dtype."""


class CoverageError(CheckpointError, ValueError):
    """No source holds a region that a target needs."""


class StorageError(CheckpointError, OSError):
    """The operating system refused something; its errno is kept, and selects the subclass as for an OSError."""

    def __new__(cls, *args: object) -> StorageError:
        builtin = _OF_ERRNO.get(args[0]) if len(args) == 2 else None
        made: StorageError = super().__new__(cls if builtin is None else also(cls, builtin), *args)
        return made

    def __str__(self) -> str:
        return spelled(str(self.args[-1])) if self.args else ""


class ReadError(StorageError, ValueError):
    """A file of a checkpoint cannot be read."""


class LoadError(CheckpointError, RuntimeError):
    """A network could not be filled. `changed` names the Parameters that may already hold new bytes."""

    def __init__(self, message: str, changed: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.changed = changed


class TransportError(CheckpointError, RuntimeError):
    """Ranks could not exchange."""


class PeerError(TransportError):
    """Another rank, `rank`, failed."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class DisagreementError(TransportError):
    """Ranks were started with different inputs."""


BLANK = frozenset(
    chr(code)
    for low, high in (
        (0x34F, 0x34F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2800, 0x2800), (0x3164, 0x3164),
        (0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xE0100, 0xE01EF),
    )
    for code in range(low, high + 1)
)  # fmt: skip
"""Characters that Python prints as they are, and that show nothing: fillers, joiners, selectors of variants."""
_JAMO = range(0x1100, 0x1200)


def spelled(text: str) -> str:
    r"""Text in which names that differ look different: what shows nothing, and what Unicode composes into another
    character or takes for one, is escaped as in Python. What a keyboard writes stays as it is.

    >>> print(spelled("caf\u00e9"), spelled("cafe\u0301"), spelled("w\ufe0f"))
    café cafe\u0301 w\ufe0f
    """
    if text.isascii():
        return text
    import unicodedata  # which few texts need

    composed = unicodedata.normalize("NFC", text) == text

    def hides(sign: str) -> bool:
        if composed:
            return False
        return bool(unicodedata.combining(sign)) or ord(sign) in _JAMO or unicodedata.normalize("NFC", sign) != sign

    return "".join(
        sign.encode("unicode_escape").decode() if sign in BLANK or (not sign.isascii() and hides(sign)) else sign
        for sign in text
    )


_ADVICE = {
    errno.ENOSPC: "free some space or choose another target, then run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space, then run the same command again",
    errno.EACCES: "check the permissions of the path",
    errno.EPERM: "check the permissions of the path",
    errno.EROFS: "the file system is read-only: choose another target",
    errno.ENOENT: "check that the path exists",
    errno.ENOTDIR: "a file stands where a folder is wanted: choose another path, or move the file away",
    errno.EEXIST: "a file stands where a folder is wanted: choose another path, or move the file away",
    errno.EISDIR: "a folder stands where a file is wanted: choose another path, or move the folder away",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
    errno.ENFILE: "the machine has too many open files: close some, then run again",
    errno.ENOMEM: "use fewer threads or smaller buffers, or give the process more memory, then run again",
    errno.EIO: "the storage failed: look at the machine's log, then run again",
}

_GENERAL_ADVICE = "check the path and the file system"
_NO_THREAD = "can't start new thread"
"""Text of Python's RuntimeError where the system refuses a thread: out of memory, or over the user's process limit."""


_OF_ERRNO: Mapping[object, type[Exception]] = {
    errno.ENOENT: FileNotFoundError,
    errno.ENOTDIR: NotADirectoryError,
    errno.EEXIST: NotADirectoryError,  # from mkdir: a file stands where a folder is wanted
    errno.EISDIR: IsADirectoryError,
    errno.EACCES: PermissionError,
    errno.EPERM: PermissionError,
    errno.ENOMEM: MemoryError,
}
_ALSO: Mapping[type[CheckpointError], tuple[type[Exception], ...]] = {
    DiscoveryError: (FileNotFoundError, NotADirectoryError),
    StrategyError: (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, TypeError),
    StorageError: tuple(dict.fromkeys(_OF_ERRNO.values())),
    ReadError: tuple(dict.fromkeys(_OF_ERRNO.values())),
}
"""Errors for which stock MindSpore raises one of these built-in ones; each pair has a subclass that is both."""
_BOTH: dict[tuple[type[CheckpointError], type[Exception]], type[CheckpointError]] = {
    (kind, builtin): type(builtin.__name__[: -len("Error")] + kind.__name__, (kind, builtin), {"__module__": __name__})
    for kind, builtins in _ALSO.items()
    for builtin in builtins
}
globals().update({made.__name__: made for made in _BOTH.values()})  # where pickle looks for them


def also(kind: type[Kind], builtin: type[BaseException]) -> type[Kind]:
    """The subclass of `kind` that is a `builtin` error too; `kind` itself where MindSpore raises no such error.

    >>> issubclass(also(StrategyError, NotADirectoryError), NotADirectoryError)
    True
    """
    found = _BOTH.get((kind, builtin), kind)  # type: ignore[arg-type]
    return cast("type[Kind]", found)


def storage_error(action: str, path: str, cause: OSError, kind: type[StorageError] = StorageError) -> StorageError:
    """Turn an `OSError` into a `StorageError` that says what was being done, to which file, and what to do."""
    reason = os.strerror(cause.errno) if cause.errno else str(cause)
    advice = _ADVICE.get(cause.errno or 0, _GENERAL_ADVICE)
    return kind(cause.errno, f"cannot {action} {path!r}: {reason}; {advice}")


def named(error: BaseException, doing: str) -> BaseException:
    """An error of the operating system, whoever called it, as a StorageError; any other error as it is.

    Args:
        doing: what could not be done, for the message.

    >>> type(named(MemoryError(), "merge")).__name__, named(KeyError("merge"), "merge")
    ('MemoryStorageError', KeyError('merge'))
    """
    if isinstance(error, CheckpointError):
        return error
    code, where = errno.ENOMEM, ""
    if isinstance(error, OSError) and error.errno is not None:
        code, where = error.errno, f": {error.filename!r}" if error.filename is not None else ""
    elif isinstance(error, MemoryError) and str(error):
        where = f" ({error})"
    elif not isinstance(error, MemoryError) and (type(error), str(error)) != (RuntimeError, _NO_THREAD):
        return error
    made = StorageError(code, f"cannot {doing}: {os.strerror(code)}{where}; {_ADVICE.get(code, _GENERAL_ADVICE)}")
    made.__cause__ = error
    return made


@contextmanager
def naming(doing: str) -> Iterator[None]:
    """Errors of the operating system inside the block are `named`."""
    try:
        yield
    except Exception as error:
        ours = named(error, doing)
        if ours is error:
            raise
        raise ours from error


def name_ranks(ranks: Sequence[int], limit: int = 16) -> str:
    """Ranks for a message, cut short when there are many.

    >>> name_ranks([3]), name_ranks([0, 2])
    ('rank 3', 'ranks 0, 2')
    """
    shown = ", ".join(map(str, ranks[:limit])) + (f" and {len(ranks) - limit} more" if len(ranks) > limit else "")
    return f"rank{'s' if len(ranks) != 1 else ''} {shown}"


def some(names: Iterable[str], limit: int = 5) -> str:
    """Names for a message, cut short when there are many.

    >>> some("abcdefg")
    "'a', 'b', 'c', 'd', 'e' and 2 more"
    """
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(map(repr, listed[:limit])) + more


def integer(value: Any, argument: str, least: Optional[int] = None, kind: str = "an int") -> int:
    """An integer of any kind as an int; True and False are refused.

    Raises:
        ArgumentTypeError: it is not an integer; the message calls it `argument`, and says that it must be `kind`.
        UsageError: it is below `least`.
    """
    try:
        if type(value).__name__ in ("bool", "bool_"):  # Python's, and numpy's, which is not imported here
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{argument} must be {kind}, got {type(value).__name__} {value!r:.60}") from None
    if least is not None and number < least:
        raise UsageError(f"{argument} must be at least {least}, got {number}")
    return number


def true_or_false(value: Any, argument: str) -> bool:
    """True or False, numpy's included, as a bool. Raises ArgumentTypeError for anything else, truthy or not."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise ArgumentTypeError(f"{argument} must be True or False, got {value!r:.60}")
    return bool(value)
