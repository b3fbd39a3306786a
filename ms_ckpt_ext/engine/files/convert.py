"""What a conversion wants: one output file for every input file, each with all of its tensors whole.

`convert_job` lays every file out anew in the wanted format: names, shapes, bytes, text, packed int4 and the file's own
notes survive; a checksum is computed anew where one is asked for. `copy_job` leaves the bytes of a file as they are and
changes how they lie on disk only, plain or encrypted, so that decrypting gives back the very file that was encrypted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Callable, Optional

from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.core.planning.pieces import SourceTensor, whole_box
from ms_ckpt_ext.engine.files.encrypted_sink import Seal
from ms_ckpt_ext.engine.files.job import Job, ListTensors, Output, Wanted
from ms_ckpt_ext.engine.source.catalog import Catalog, whole_tensor
from ms_ckpt_ext.errors import ChecksumError, FormatError, UsageError
from ms_ckpt_ext.formats import ckpt, registry
from ms_ckpt_ext.formats.ckpt import CRC_OFFSET
from ms_ckpt_ext.formats.ckpt_writer import crc_tail
from ms_ckpt_ext.formats.crypto import BLOCK_MAGIC
from ms_ckpt_ext.formats.discovery.torch_slices import refuse_slices
from ms_ckpt_ext.formats.index import CRC_NUM, Checksum, FileIndex, FileLayout, TensorEntry, TensorSpec
from ms_ckpt_ext.formats.registry import PLAIN, Access
from ms_ckpt_ext.formats.table import format_of
from ms_ckpt_ext.storage.linux import read_small
from ms_ckpt_ext.storage.reader import ByteReader, PlainReader, from_json, refuse_changed

RenameFunction = Callable[[str], Optional[str]]
_CONTENTS = "the file"
"""Name of the one pseudo tensor of a file that is copied as it is."""


def convert_job(
    inputs: Mapping[str, str],
    access: Access = PLAIN,
    rename: RenameFunction = lambda name: name,
    crc: bool = False,
    index: Mapping[str, bytes] = {},
    seal: Optional[Seal] = None,
    digests: bool = True,
) -> Job:
    """Every input file in the format that its output's name says.

    Args:
        inputs: output name, relative to the target -> path of the input file.
        access: how the inputs are opened.
        rename: parameter name in the input -> name in the output, or None to leave it out.
        crc: give every output a checksum; those in MindSpore's encrypted blocks have one in any case.
        index: small files that go along, published last: name -> contents.
        seal: how the outputs are encrypted; None when they are not.
        digests: write a manifest of digests beside the outputs.

    Raises:
        UsageError: two parameters of a file get the same name, none is left, or the format cannot hold one.
        FormatError, DecryptionError, ChecksumError, StorageError: as the readers say.
    """
    indexes = tuple(registry.read_indexes(inputs.values(), access))
    refuse_slices(indexes)
    tensors: dict[str, SourceTensor] = {}
    outputs = []
    for number, (name, held) in enumerate(zip(inputs, indexes)):
        mine = {stored: whole_tensor(stored, entry, [number]) for stored, entry in held.tensors.items()}
        tensors.update({f"{number}/{stored}": tensor for stored, tensor in mine.items()})
        checked = crc or (seal is not None and seal.needs_crc(name))
        outputs.append(_converted(name, held, mine, rename, checked))
    return Job(Catalog(indexes, tensors, {}, {}, access), tuple(outputs), index=index, seal=seal, digests=digests)


def _converted(
    name: str, held: FileIndex, tensors: Mapping[str, SourceTensor], rename: RenameFunction, crc: bool
) -> Output:
    # MindSpore converts to .ckpt in the order of names, and to safetensors in that format's own order.
    form = format_of(held.path)
    order = sorted(tensors) if form is not None and form.by_name else tensors
    renamed = _renamed(held.path, {stored: rename(stored) for stored in order})
    specs = [TensorSpec(new, *held.tensors[stored][:2]) for stored, new in renamed.items()]
    layout = registry.lay_out(name, specs, {"format": "ms", **_notes(held, renamed)}, crc)
    if not layout.size:
        raise UsageError(
            f"{held.path!r} holds no parameter: as .ckpt it would be an empty file, as an interrupted save leaves it, "
            "and which MindSpore does not load; leave it out, or keep it as safetensors"
        )
    wanted = (Wanted(new, tensors[stored], whole_box(tensors[stored])) for stored, new in renamed.items())
    return Output(name, layout, tuple(wanted), lambda: layout.tensors)


def _renamed(path: str, chosen: Mapping[str, Optional[str]]) -> dict[str, str]:
    """Old name -> new name of what is kept."""
    olds: dict[str, str] = {}
    for old, new in chosen.items():
        if new is not None and olds.setdefault(new, old) != old:
            raise UsageError(f"both {olds[new]!r} and {old!r} of {path!r} get the name {new!r}; names must stay unique")
    if chosen and not olds:
        raise UsageError(f"choice_func dropped every parameter of {path!r}; nothing would be written")
    return {old: new for new, old in olds.items()}


def _notes(held: FileIndex, renamed: Mapping[str, str]) -> dict[str, str]:
    """A file's own notes as they are after a conversion; those about checksums are not true any more."""
    notes = {key: note for key, note in held.metadata.items() if key not in (CRC_NUM, CRC_OFFSET)}
    about = {key for key in notes if key in held.tensors}
    return {renamed.get(key, key): note for key, note in notes.items() if key not in about or key in renamed}


def copy_job(
    inputs: Mapping[str, str],
    access: Access = PLAIN,
    index: Mapping[str, bytes] = {},
    seal: Optional[Seal] = None,
    digests: bool = True,
) -> Job:
    """Every input file as it is: the same plaintext, byte for byte. Arguments and errors as for `convert_job`.

    A checksum inside MindSpore's blocks is compared with the output before that is accepted: nothing else would tell
    that blocks changed places.
    """
    indexes, tensors, outputs = [], {}, []
    for number, (name, path) in enumerate(inputs.items()):
        with registry.open_reader(path, access) as reader:
            size, kind = reader.size, reader.traits.container
            checksum = _to_be_proved(path, reader) if kind in BLOCK_MAGIC.values() else None
            entry = TensorEntry(DTYPES["U8"], (size,), (Extent(0, size),))
            held = FileIndex(path, reader.disk_size, reader.mtime_ns, {_CONTENTS: entry}, {}, kind)
            indexes.append(held)
            holds = _holds(held, reader)
        tensor = tensors[f"{number}/{_CONTENTS}"] = whole_tensor(_CONTENTS, entry, [number])
        layout = FileLayout(size, (), {_CONTENTS: entry}, checksum)
        outputs.append(Output(name, layout, (Wanted(_CONTENTS, tensor, whole_box(tensor)),), holds))
    source = Catalog(tuple(indexes), tensors, {}, {}, access)
    return Job(source, tuple(outputs), index=index, seal=seal, digests=digests)


def _holds(index: FileIndex, reader: ByteReader) -> Optional[ListTensors]:
    """What lists the tensors of a plain file that is copied, when it is its turn, for there may be many.

    It must be a checkpoint: encrypted, what is none might not be told from one by a wrong key. None for an encrypted
    file: to list a `.ckpt` is to decrypt most of it, and what cannot be listed is decrypted all the same.
    """
    if not isinstance(reader, PlainReader):
        return None
    registry.index_through(reader, index.path)

    def again() -> Mapping[str, TensorEntry]:
        found = registry.read_index(index.path)
        refuse_changed(index, found.size, found.mtime_ns)
        return found.tensors

    return again


def _to_be_proved(path: str, reader: ByteReader) -> Optional[Checksum]:
    """The checksum at the end of a decrypted `.ckpt`, which is written as it is if it fits what was written before."""
    form = format_of(path)
    stored = ckpt.stored_crc(reader) if form is not None and form.blocks else None
    if stored is None:
        return None
    end = reader.size - ckpt.CRC_TAIL

    def render(found: int) -> bytes:
        if found != stored:
            raise ChecksumError(
                f"{path!r}: the CRC-32 of bytes 0 to {end} of what it decrypts to is {found}, but "
                f"{stored} is stored behind them: blocks were exchanged or altered after the file "
                "was encrypted, or it was damaged before; nothing was written: restore it or choose another checkpoint"
            )
        return crc_tail(found)

    return Checksum((Extent(0, end),), end, render)


def renamed_map(path: str, files: Mapping[str, str], rename: RenameFunction) -> bytes:
    """A merged checkpoint's map (`param_name_map.json`, Hugging Face's index) as it is after a conversion.

    Args:
        path: the map.
        files: file name in the map -> its new name.
        rename: parameter name -> its new name, or None where it is left out.

    Raises:
        FormatError: it is not such a map.
    """
    try:
        content: Any = from_json(read_small(path))
        listed = content.get("weight_map", content)
        named = {rename(name): files.get(file, file) for name, file in listed.items()}
        named.pop(None, None)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise FormatError(f"{path!r} is not a parameter map ({error}); restore it, or move it away") from error
    return json.dumps({**content, "weight_map": named} if listed is not content else named, indent=4).encode()
