"""What a checkpoint holds besides its slices: training scalars, text."""

from __future__ import annotations

from typing import Any, Optional

from ms_ckpt_ext.api.arguments import PathLike, access_of, as_strategy, checked_words, path_of
from ms_ckpt_ext.engine.source.values import read_extras
from ms_ckpt_ext.formats.crypto import KeyLike


def training_scalars(
    checkpoint_dir: PathLike,
    strategy_file: Any = None,
    file_suffix: Optional[str] = None,
    *,
    dec_key: Optional[KeyLike] = None,
    dec_mode: str = "AES-GCM",
    crc_check: bool = False,
) -> dict[str, Any]:
    """What a checkpoint holds outside its strategy: `global_step`, `epoch_num`, `loss_scale`, learning rate and so on.

    That is text, and tensors with at most one axis; matrices are left out. So is what differs between ranks, with a
    warning that names it.

    Args:
        checkpoint_dir: a merged or a sharded checkpoint, of either format; or one file.
        strategy_file: of a sharded one, in any form that `as_strategy` takes; without it, and in a file, every
            parameter of a single element is a scalar.
        file_suffix: which file of a rank folder; None for the newest.
        dec_key, dec_mode, crc_check: as in `load_distributed_checkpoint`.

    Returns:
        name -> numpy array of the stored shape and dtype (raw uint16 for BF16, uint8 for narrower types); text is str.

    Raises:
        DiscoveryError, StrategyError, FormatError, StorageError: as for the merge.
    """
    checked_words(training_scalars, locals())
    strategy = as_strategy(strategy_file, argument="strategy_file")
    access = access_of(dec_key, dec_mode, crc_check)
    return read_extras(path_of(checkpoint_dir, "checkpoint_dir"), strategy, file_suffix, access)
