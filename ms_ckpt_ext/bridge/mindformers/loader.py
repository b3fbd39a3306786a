"""MindFormers' `load_checkpoint` and `load_hf_checkpoint`, with every rank reading its own bytes only.

1. MindFormers says what this rank wants: the layouts of the network's and the optimizer's parameters.
2. The folder says where that lies: `metadata.json`, or Hugging Face's index and the model's weight converters as rules.
3. Bytes go straight into the Parameters: read by each rank, or by one and exchanged (`Options.mode`).

The stock loader reads whole tensors of every file that a rank needs a part of, twice where there is no metadata, and
holds them beside the network. What this cannot serve goes to it, with a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Callable, Optional

from ms_ckpt_ext import log
from ms_ckpt_ext.bridge import network as live
from ms_ckpt_ext.bridge import world
from ms_ckpt_ext.bridge.mindformers.converters import rules_for
from ms_ckpt_ext.bridge.mindformers.options import Options
from ms_ckpt_ext.bridge.request import LoadRequest
from ms_ckpt_ext.bridge.settle import Manner
from ms_ckpt_ext.bridge.together import SharedSource, fill_together, give_up
from ms_ckpt_ext.bridge.world import mindspore as ms
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, LayoutItem, Strategy
from ms_ckpt_ext.core.planning.rule import Rule
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.source.listing import list_checkpoint
from ms_ckpt_ext.engine.source.renaming import Naming
from ms_ckpt_ext.errors import CheckpointError, StrategyError, UnsupportedError
from ms_ckpt_ext.formats.discovery.mindformers import Folder, find_folder, layout_of, read_common
from ms_ckpt_ext.formats.registry import PLAIN


class Both(ms.nn.Cell):
    """A network and its optimizer as one thing to fill; each Parameter once."""

    def __init__(self, cells: Iterable[Any]) -> None:
        super().__init__(auto_prefix=False)
        object.__setattr__(self, "_members", tuple(cells))

    def parameters_and_names(self, name_prefix: str = "", expand: bool = True) -> Iterator[tuple[str, Any]]:
        """(name, Parameter) of all members."""
        seen: set[int] = set()
        for cell in self._members:
            for parameter in cell.get_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter.name, parameter


def load_checkpoint(
    stock: Callable[[], Any],
    options: Options,
    checkpoint: str,
    network: Any,
    optimizer: Any = None,
    global_step: Optional[int] = None,
    balanced_load: bool = False,
    reshard_worker_num: int = 1,
    **more: Any,
) -> None:
    """Drop-in for `mindformers.checkpoint.checkpoint.load_checkpoint`.

    Args:
        stock: makes the same call of MindFormers' own function.
        options: how to load.
        checkpoint, network, ...: MindFormers' arguments; `reshard_worker_num` has no meaning here.

    Raises:
        DiscoveryError, StrategyError, FormatError, LayoutMismatchError, CoverageError: bad input; nothing was changed.
        LoadError: the load stopped on the way; `changed` names the Parameters that may hold new bytes.
    """
    from mindformers.checkpoint import checkpoint as theirs

    if _stranger(network, more):
        stock()
        return
    theirs.check_the_param_for_load_ckpt(checkpoint, network)
    directory = theirs.get_checkpoint_path(checkpoint)
    if not hasattr(theirs, "load_hf_checkpoint") and find_folder(directory) is None:
        log.warning("%r is no folder of MindFormers' own; MindFormers' own loader serves this call", directory)
        stock()  # before 2.0 this function takes Hugging Face directories too, by code of the model
        return
    names = None if optimizer is not None else set(network.parameters_dict())

    def wanted(name: str) -> bool:
        return not name.startswith(ACCUMULATED_GRADIENT_PREFIX) and (names is None or name in names)

    target = partial(_target, network, optimizer, wanted)
    cells = [network] if optimizer is None else [network, optimizer]
    missing = _fill(cells, directory, (), target, options, balanced_load)
    if optimizer is not None and "global_step" in missing:
        set_step(optimizer, _step(directory, global_step))


def load_hf_checkpoint(
    stock: Callable[[], Any],
    options: Options,
    pretrained_model_dir: str,
    network: Any,
    balanced_load: bool = False,
    reshard_worker_num: int = 1,
    **more: Any,
) -> None:
    """Drop-in for `mindformers.checkpoint.checkpoint.load_hf_checkpoint`; see `load_checkpoint`."""
    from mindformers.checkpoint.utils import get_core_network

    core = get_core_network(network)
    if getattr(core, "template", None) is None or _stranger(network, more):
        stock()
        return
    try:
        rules = rules_for(core)
    except UnsupportedError as refusal:
        log.warning("%s; MindFormers' own loader serves this call", refusal)
        stock()
        return
    names = set(network.parameters_dict())
    target = partial(_target, network, None, lambda name: name in names)
    _fill([network], pretrained_model_dir, rules, target, options, balanced_load)


def _stranger(network: Any, more: Mapping[str, Any]) -> bool:
    """True, and a warning, for what MindFormers' own loader must serve."""
    try:
        from mindformers.checkpoint.layout_adapter import LayoutAdapter

        pynative = LayoutAdapter.is_pynative_mode()
    except ImportError:  # before 2.0 there is graph mode only
        pynative = False
    reason = ""
    if more:
        reason = f"arguments this package does not know: {sorted(more)}"
    elif isinstance(network, list):
        reason = "a list of networks"
    elif pynative:
        reason = "PyNative mode, whose parameters are DTensors"
    if reason:
        log.warning("%s; MindFormers' own loader serves this call", reason)
    return bool(reason)


def _target(network: Any, optimizer: Any, wanted: Callable[[str], bool]) -> Optional[Strategy]:
    """What this rank holds of every parameter, from the layouts of the compiled network; None on one device."""
    from mindformers.checkpoint import sharded_tensor as theirs
    from mindformers.tools.utils import get_real_group_size, get_real_rank

    world, rank = get_real_group_size(), get_real_rank()
    if world == 1:
        return None
    tensors = theirs.get_cur_sharded_tensor(network, wanted)
    complete = getattr(theirs, "complete_optimizer_sharded_tensor", None)
    if optimizer is not None and complete is not None:
        tensors = complete(tensors, optimizer, wanted)
    origin = "the layouts of the compiled network"
    layouts = {
        name: None if tensor.layout is None else layout_of(name, tensor.layout.to_dict(), origin)
        for name, tensor in tensors.items()
    }
    devices = next((layout.devices for layout in layouts.values() if layout is not None), world)
    items = [
        LayoutItem(name, rank // devices, layout or Layout((devices,), ((),) * len(tensors[name].global_shape or ())))
        for name, layout in layouts.items()
    ]
    if not items:
        raise StrategyError(f"{origin} name no parameter for rank {rank}; compile the network before loading")
    return Strategy.from_items(items, origin)


def _fill(
    cells: list[Any],
    directory: str,
    rules: tuple[Rule, ...],
    target: Callable[[], Optional[Strategy]],
    options: Options,
    balanced: bool,
) -> list[str]:
    """Fill the Parameters; returns the names of those that got nothing."""
    mode = "cooperative" if balanced and options.way == "auto" else options.way
    settings = LoadOptions(
        mode=mode,
        bucket_bytes=options.bucket_bytes,
        threads=options.workers,
        verify=options.verify,
        hardware=options.hardware,
    )
    alone = world.world_size() == 1 or (mode == "direct" and options.verify == "none")
    look = partial(list_checkpoint, directory, None)
    try:
        wanted = target()
    except CheckpointError as error:
        if alone:
            raise
        give_up(error, settings.timeout)
    rank = world.own_rank() if wanted is not None else 0
    request = LoadRequest(Both(cells), wanted, rank, _MANNER, rules, options=settings, workers=options.workers)
    if alone or wanted is None:
        listing = look()
        request = request._replace(naming=_listed(listing.folder))
        filled = live.fill(request, request.read(listing, None, PLAIN))
    else:
        filled = fill_together(request, SharedSource(look, naming=_listed))
    log.info("loaded %s by ms_ckpt_ext; not in the network: %s", directory, filled.unused or "nothing")
    return filled.missing


_MANNER = Manner(strict=False, exact=True)


def _listed(folder: Optional[Folder]) -> Optional[Naming]:
    """Only what a `metadata.json` lists: MindFormers loads nothing else, such as an old learning rate."""
    cuts = None if folder is None else folder.cuts
    return None if cuts is None else Naming(cuts.__contains__)


def _step(directory: str, given: Optional[int]) -> int:
    """The step that a checkpoint without `global_step` stands for: as given, else from `common.json`, else 0."""
    return int(given or read_common(directory).get("global_step", 0))


def set_step(cell: Any, step: int) -> None:
    """Give a cell's `global_step` this value."""
    for parameter in cell.get_parameters():
        if parameter.name == "global_step":
            parameter.set_data(ms.Tensor([step], ms.int32))
