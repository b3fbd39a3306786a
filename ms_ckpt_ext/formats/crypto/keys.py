"""Keys: where they come from, how long they are, and that they are shown nowhere.

A key is 16, 24 or 32 bytes (AES-128, -192, -256; SM4 takes 16). It comes from exactly one of: the bytes themselves, a
file, an environment variable. A file or variable holds the raw bytes, or text with a prefix: `hex:…` or `base64:…`.
No repr and no message contains key bytes, not even an error about them; nor the name of a file or variable that
does not exist and may be a key in the wrong place.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from typing import Any, Optional, Union

from ms_ckpt_ext.errors import ArgumentTypeError, StorageError, UsageError, storage_error

AES_LENGTHS = (16, 24, 32)
SM4_LENGTHS = (16,)
_MAX_FILE = 1024
"""Most bytes of a key file that are read: the longest legal content, base64 of 32 bytes, has 51."""


_VARIABLE = re.compile(r"^[A-Za-z_]\w*\Z", re.ASCII)
_DIGITS = re.compile(r"^([0-9A-Fa-f]{32,}|[A-Za-z0-9+/_-]{22}==|[A-Za-z0-9+/_-]{43}=)\Z")
"""Hexadecimal of 16 bytes or more, or base64 of 16 or 32; base64 of 24 is as long as a raw key."""


class Key:
    """Key bytes that do not print themselves."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) not in AES_LENGTHS:
            raise UsageError(f"a key of {len(secret)} bytes; it must have 16, 24 or 32")
        self._secret = bytes(secret)

    def reveal(self) -> bytes:
        """The key bytes, for a cipher and nothing else."""
        return self._secret

    def __len__(self) -> int:
        return len(self._secret)

    def __reduce__(self) -> Any:
        raise TypeError("a Key is not pickled, for the key would lie in the pickle: load it where it is needed")

    def __copy__(self) -> Key:
        return self

    def __deepcopy__(self, _memo: object) -> Key:
        return self

    def __repr__(self) -> str:
        return f"Key({len(self)} bytes, hidden)"


KeyLike = Union[bytes, bytearray, Key]


def as_key(key: KeyLike, lengths: tuple[int, ...] = AES_LENGTHS) -> Key:
    """`key` as a `Key`, of one of these lengths in bytes.

    Raises:
        ArgumentTypeError: it is not bytes.
        UsageError: it has another length.
    """
    if not isinstance(key, (bytes, bytearray, Key)):
        raise ArgumentTypeError(f"a key must be bytes, not {type(key).__name__}; encode text keys yourself")
    if len(key) not in lengths:
        raise UsageError(f"a key of {len(key)} bytes; this cipher takes {' or '.join(map(str, lengths))}")
    return key if isinstance(key, Key) else Key(bytes(key))


def load_key(key: Optional[KeyLike] = None, *, file: Optional[str] = None, env: Optional[str] = None) -> Optional[Key]:
    """The key from the one source that is given; None when none is.

    Args:
        key: the bytes themselves.
        file: path of a file with the key.
        env: name of an environment variable with the key.

    Returns:
        The key, which no message or `repr` shows; None when no source is given.

    Raises:
        UsageError: several sources, an unset variable, or contents that are not a key.
        ArgumentTypeError: `file` or `env` is not a str.
        StorageError: the file cannot be read.
    """
    for what, source in (("file", file), ("env", env)):
        if source is not None and not isinstance(source, str):
            raise ArgumentTypeError(f"{what} must be a str that says where the key is, not {type(source).__name__}")
    given = [name for name, value in (("key", key), ("file", file), ("env", env)) if value is not None]
    if len(given) > 1:
        raise UsageError(f"the key is given {len(given)} times, by {' and '.join(given)}; give it once")
    if file is not None:
        return Key(_decode(_read(file), f"key file {file!r}"))
    if env is not None:
        return Key(_decode(_getenv(env), f"environment variable {env}"))
    return None if key is None else as_key(key)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read(_MAX_FILE + 1)
    except OSError as error:
        if not os.path.lexists(path) and _may_be_key(path):
            raise StorageError(
                error.errno,
                f"cannot read the key file: {os.strerror(error.errno or 0)}; its name is not repeated, for it looks "
                "like a key, which does not belong there: write the key into a file, and give the file's path",
            ) from None
        raise storage_error("read the key file", path, error) from None
    except ValueError:
        raise UsageError("the path of the key file holds a character that no path can have; give another") from None


def _getenv(name: str) -> bytes:
    if not _VARIABLE.match(name) or (name not in os.environ and not name.isupper() and _may_be_key(name)):
        raise UsageError(
            "what is given as an environment variable's name is none, or not set; it is not repeated, for it may be "
            "a key, which does not belong there: put the key into a variable, and give the variable's name"
        )
    if name not in os.environ:
        raise UsageError(f"environment variable {name} is not set; it should hold the key")
    return os.fsencode(os.environ[name])


def _may_be_key(text: str) -> bool:
    """Whether a text has the form of a key: with a prefix, raw, or in digits without one."""
    return (
        text.startswith(("hex:", "base64:")) or len(os.fsencode(text)) in AES_LENGTHS or _DIGITS.match(text) is not None
    )


def _without_newline(raw: bytes) -> bytes:
    """Without the one newline that an editor adds, if that leaves a key; a key may itself end in such bytes."""
    for newline in (b"\n", b"\r\n"):
        if raw.endswith(newline) and len(raw) - len(newline) in AES_LENGTHS:
            return raw[: -len(newline)]
    return raw


def _decode(raw: bytes, source: str) -> bytes:
    """Key bytes from the contents of a source; errors name the source and never quote it."""
    secret = raw if len(raw) in AES_LENGTHS else _without_newline(raw)
    try:
        if raw.startswith(b"hex:"):
            secret = binascii.unhexlify(raw[4:].strip())
        elif raw.startswith(b"base64:"):
            secret = base64.b64decode(raw[7:].strip(), validate=True)
    except (binascii.Error, ValueError):
        raise UsageError(f"{source} does not hold what its prefix promises; use hex:… or base64:…") from None
    if len(secret) not in AES_LENGTHS:
        raise UsageError(
            f"{source} holds a key of {len(secret)} bytes; 16, 24 or 32 are needed, raw or as text with hex: or base64:"
        )
    return secret
