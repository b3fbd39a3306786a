"""`load_checkpoint` in the background."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

from ms_ckpt_ext.api.arguments import PathLike, path_of
from ms_ckpt_ext.api.mindspore.parameters import load_checkpoint
from ms_ckpt_ext.api.mindspore.prefixes import Prefix
from ms_ckpt_ext.api.mindspore.unserved import refuse_what_is_no_file
from ms_ckpt_ext.formats.crypto import KeyLike
from ms_ckpt_ext.formats.table import CKPT, format_of

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ms_ckpt_ext.engine.source.renaming import Choice


def load_checkpoint_async(
    ckpt_file_name: PathLike,
    net: Any = None,
    strict_load: bool = False,
    filter_prefix: Prefix = None,
    dec_key: Optional[KeyLike] = None,
    dec_mode: str = "AES-GCM",
    specify_prefix: Prefix = None,
    choice_func: Optional[Choice] = None,
    *,
    name_map: Optional[Mapping[str, str]] = None,
    verify: str = "none",
) -> Future[dict[str, Any]]:
    """`load_checkpoint` in a thread. Drop-in for `mindspore.load_checkpoint_async`.

    The format is what the name's suffix says. Other arguments are those of `load_checkpoint`.

    Returns:
        A future: its `result()` waits, and returns or raises what `load_checkpoint` does.

    Raises:
        UnsupportedError: as `load_checkpoint` for what is no path.
        ArgumentTypeError: `ckpt_file_name` is no path.
    """
    from concurrent.futures import ThreadPoolExecutor

    refuse_what_is_no_file(ckpt_file_name)
    source = path_of(ckpt_file_name, "ckpt_file_name")
    form = (format_of(source) or CKPT).name
    stock = (net, strict_load, filter_prefix, dec_key, dec_mode, specify_prefix, choice_func)
    executor = ThreadPoolExecutor(1, "ms_ckpt_ext-load")
    future = executor.submit(load_checkpoint, source, *stock, format=form, name_map=name_map, verify=verify)
    executor.shutdown(wait=False)  # the thread ends with its work
    return future
