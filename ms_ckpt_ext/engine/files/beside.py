"""Results of conversions beside their inputs: what is there already under a result's name.

Beside a checkpoint, a file of the other format and the same name may be an earlier conversion of it, by whatever
program, or another checkpoint, which must not be lost. It is told by what it is:

1. On record as published here, and untouched: replaced.
2. Its parameters have the names, dtypes and shapes that the result has, or the input: a conversion of the input. One
   that is older than the input was made of what the input was before, and is replaced. One that is newer must have the
   input's values; it is left as it is, unless a checksum or encryption is asked for, which it need not have.
3. Anything else is in the way.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple, Optional

from ms_ckpt_ext.engine.files.job import Job, Output
from ms_ckpt_ext.engine.files.overwrite import Records
from ms_ckpt_ext.engine.integrity.digests import digest_tensors
from ms_ckpt_ext.errors import CheckpointError, DiscoveryError
from ms_ckpt_ext.formats.index import FileIndex, TensorEntry
from ms_ckpt_ext.formats.registry import PLAIN, Access, read_index, reopen


class _Found(NamedTuple):
    """A file that has the name of a result: `strange` says why it is in the way, `same` whether it will do."""

    strange: str = ""
    same: bool = False


def settle(job: Job, target: str) -> tuple[Job, tuple[str, ...]]:
    """What of a conversion beside its inputs is to be written, and which results are there already.

    Args:
        job: has one output for each of its source's files, in their order.
        target: the directory of both.

    Raises:
        DiscoveryError: a file that is no conversion of its input has the name of a result.
    """
    records = Records()
    same = []
    for output, source in zip(job.outputs, job.source.files):
        path = os.path.join(target, output.name)
        if not os.path.lexists(path) or records.holds(target, output.name):
            continue
        found = _look(path, output, source, job)
        if found.strange:
            raise DiscoveryError(
                f"{path!r} is in the way of what {source.path!r} becomes: no conversion is on record to have written "
                f"it as it is, and {found.strange}; move it away, or choose another directory for the results"
            )
        same += [output.name] if found.same else []
    todo = tuple(output for output in job.outputs if output.name not in same)
    return job.only(todo), tuple(same)


def _look(path: str, output: Output, source: FileIndex, job: Job) -> _Found:
    if os.path.realpath(path) == os.path.realpath(source.path):
        return _Found()  # which the job refuses by itself
    access = PLAIN if job.seal is None else job.seal.access(output.name)._replace(mode=None, optional=True)
    renamed = {wanted.name: wanted.tensor.stored_name for wanted in output.wanted}
    try:
        there = read_index(path, access)
        held = _metas(there.tensors)
        fitting = [
            names for names in (renamed, dict(zip(source.tensors, source.tensors))) if held == _of(source, names)
        ]
        if not fitting:
            return _Found(_other_parameters(held, _metas(output.layout.tensors)))
        if there.mtime_ns < source.mtime_ns:
            return _Found()
        differs = _differs({name: fitting[0][name] for name in held}, there, access, source, job.source.access)
    except (CheckpointError, OSError) as error:
        return _Found(f"it cannot be read as a checkpoint ({error})")
    if differs is not None:
        return _Found(f"it is newer than the input and has other values (parameter {differs!r})")
    plain = job.seal is None and output.layout.checksum is None and not job.index
    return _Found(same=plain and fitting[0] is renamed)


_Meta = tuple[str, tuple[int, ...]]


def _metas(tensors: Mapping[str, TensorEntry]) -> dict[str, _Meta]:
    """Dtype and shape of what has elements: MindSpore's conversions lose what has none."""
    return {name: (entry.dtype.name, entry.shape) for name, entry in tensors.items() if entry.nbytes}


def _of(source: FileIndex, names: Mapping[str, str]) -> dict[str, _Meta]:
    """What a conversion of the input holds that gives its parameters new names: new name -> name in the input."""
    return _metas({new: source.tensors[old] for new, old in names.items()})


def _other_parameters(held: Mapping[str, _Meta], expected: Mapping[str, _Meta]) -> str:
    name = min(name for name in {*held, *expected} if held.get(name) != expected.get(name))
    return f"it holds other parameters ({name!r}: {_told(held.get(name))} there, {_told(expected.get(name))} here)"


def _told(meta: Optional[_Meta]) -> str:
    return "nothing" if meta is None else f"{meta[0]} {list(meta[1])}"


def _differs(
    names: Mapping[str, str], there: FileIndex, access: Access, source: FileIndex, source_access: Access
) -> Optional[str]:
    """A parameter that two files hold with other values; None when all are the same, bit for bit."""
    found = digest_tensors(there, names, opener=lambda _: reopen(there, access))
    known = digest_tensors(source, {*names.values()}, opener=lambda _: reopen(source, source_access))
    return next((name for name, old in names.items() if found[name] != known[old]), None)
