"""What a run left behind, and whether that is allowed."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ms_ckpt_ext
from ms_ckpt_ext.errors import CheckpointError
from ms_ckpt_ext.formats.registry import Access, open_reader
from ms_ckpt_ext.storage.publishing import OBSTACLE, is_unfinished
from ms_ckpt_ext.transport.control import FIRST_MEETING
from tests.chaos.faults import ERROR, KILLED, RIGHT, Struck
from tests.chaos.inputs import KEY
from tests.chaos.jobs import Job, Place
from tests.chaos.running import Ended

HIDDEN = ".ms_ckpt_ext"
RECORD = ".ms_ckpt_ext.json"
_NAMED_CODES = (3, 4, 6)
_LACKING = 5
_INTERRUPTED = 130
_DIFFERENT = 1
_IN_PROGRESS = re.compile(r"^(\.lock|claims|[0-9a-f]+\.journal(\.partial)?|[0-9a-f]+(/.*)?)$")


class Result(NamedTuple):
    """What a job makes: a digest of every rank, or every file of its target."""

    ranks: Mapping[str, str]
    files: Mapping[str, bytes]
    names: frozenset[str]
    """Names of all files in the target, hidden ones too."""


class Verdict(NamedTuple):
    """The outcome of a run, and what is wrong with it."""

    outcome: str
    wrong: tuple[str, ...]


def result_of(job: Job, place: Place, ended: Sequence[Ended]) -> Result:
    """What a run made that is known to be right."""
    assert all(each.code == 0 for each in ended), ended
    ranks = {rank: told["digest"] for rank, told in _reports(ended).items()} if job.ranks else {}
    return Result(ranks, visible(job, place.target), frozenset(everything(place.target)))


def visible(job: Job, target: Path) -> dict[str, bytes]:
    """Files of a result; encrypted ones as their plaintext, since their bytes differ every time."""
    found = {}
    for name in everything(target):
        if not name.startswith(HIDDEN):
            path = target / name
            sealed = job.sealed and path.suffix == ".safetensors" and path.name != OBSTACLE
            found[name] = _opened(path) if sealed else path.read_bytes()
    if job.sealed:  # digests are sealed, and sizes alike
        found.pop("ms_ckpt_ext.digests.json", None)
    return {name: _told(held) if name == "ms_ckpt_ext.digests.json" else held for name, held in found.items()}


def everything(target: Path) -> list[str]:
    """Names of all files, relative to the target."""
    return sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())


def _opened(path: Path) -> bytes:
    try:
        with open_reader(str(path), Access(KEY, None)) as reader:
            held = bytearray(reader.size)
            reader.read_into(0, memoryview(held))
            return bytes(held)
    except CheckpointError as error:
        return f"unreadable: {error}".encode()


def _told(document: bytes) -> bytes:
    """A JSON document, whatever the order of its entries."""
    return json.dumps(json.loads(document), sort_keys=True).encode()


def judge(
    job: Job,
    place: Place,
    struck: Struck,
    ended: Sequence[Ended],
    rivals: Sequence[Ended],
    right: Sequence[Result],
    older: Sequence[Result],
    victim: int,
) -> Verdict:
    """The outcome of a run under a fault.

    Args:
        right: what it may make.
        older: what may stand in the target instead: of an earlier job, or of one that ran meanwhile.
        victim: the rank that the fault was for; -1 for all.
    """
    wrong: list[str] = []
    for each in (*ended, *rivals):
        wrong += _of_process(each)
    if job.ranks:
        outcome = _of_ranks(ended, struck, right, victim, wrong)
    else:
        outcome = _of_command(job, place, struck, ended[0], wrong)
        for rival in rivals:
            _of_command(job, place, Struck(may=frozenset({RIGHT, ERROR})), rival, wrong)
    if job.writes:
        wrong += _of_target(job, place, struck, outcome, right, older)
    if outcome not in struck.may:
        wrong.append(f"it may not end so: {outcome}")
    wrong += [f"left in the temporary folder: {path.name}" for path in (place.root / "tmp").iterdir()] * (
        outcome != KILLED
    )
    return Verdict(outcome, tuple(dict.fromkeys(wrong)))


def _of_process(ended: Ended) -> Iterator[str]:
    if ended.code is None:
        yield f"it did not end in time: {ended.err[-3000:]}"
    if ended.children:
        yield f"{ended.children} processes outlived it"
    yield from re.findall(r"(?m)^Fatal Python error.*|Segmentation fault.*|.*ResourceWarning.*", ended.err)


def _of_command(job: Job, place: Place, struck: Struck, ended: Ended, wrong: list[str]) -> str:
    """A command line's end: done, an error in words and with a code of its own, or a signal."""
    code, said = ended.code, ended.err.strip()
    if code == 0:
        return RIGHT
    if code is None or code < 0:
        return KILLED
    if code == _INTERRUPTED:
        if "interrupted; run the same command again" not in said:
            wrong.append(f"interrupted without a word: {said[-300:]}")
        return KILLED
    if code == _DIFFERENT and not job.writes and (struck.spoils or "cannot " in ended.out):
        return ERROR
    if code == _LACKING and not struck.told and "failed to map" in said:  # a library, for which there was no memory
        return ERROR
    if code not in _NAMED_CODES or "Traceback" in said or " error: " not in said:
        wrong.append(f"exit code {code}: {said[-1500:]}{ended.out[-600:]}")
    elif struck.told and str(place.root) not in said and not re.search(r"parameter '.*rank \d", said):
        wrong.append(f"an error that names no file: {said[-300:]}")
    return ERROR


def _of_ranks(ended: Sequence[Ended], struck: Struck, right: Sequence[Result], victim: int, wrong: list[str]) -> str:
    """Every rank holds what it should, or has an error of the package's; all ranks end alike."""
    told = _reports(ended)
    dead = [number for number, each in enumerate(ended) if each.code is None or each.code < 0]
    interrupted = [number for number, each in enumerate(ended) if each.code == 1 and "KeyboardInterrupt" in each.err]
    for number, each in enumerate(ended):
        if number not in dead + interrupted and not _is_report(each.out):
            wrong.append(f"process {number} ended with {each.code} and no report: {each.err[-600:]}")
    errors = {rank: report for rank, report in told.items() if "error" in report}
    for rank, report in errors.items():
        if not report["named"]:
            wrong.append(f"rank {rank}: {report['error']}: {report['message']}\n{report['traceback']}")
    for report in map(_document, ended):
        if report and (report["threads"] or (report["descriptors"] > 0 and not errors)):
            wrong.append(f"left: threads {report['threads']}, {report['descriptors']} descriptors")
    if dead or interrupted:
        if len(ended) > 1 and victim >= 0:
            wrong += [
                f"rank {rank} does not say which rank has gone: {report['message']}"
                for rank, report in errors.items()
                if f"rank {victim}" not in report["message"] and FIRST_MEETING not in report["message"]
            ]
        return KILLED
    if errors:
        held = [rank for rank in told if rank not in errors]
        if held:
            wrong.append(f"ranks {held} hold a result, others have errors: {errors}")
        return ERROR
    digests = {rank: report.get("digest") for rank, report in told.items()}
    if not any(digests == dict(result.ranks) for result in right):
        wrong.append("ranks hold other bytes than they should")
    return RIGHT


def _reports(ended: Sequence[Ended]) -> dict[str, dict[str, Any]]:
    return {rank: told for each in ended for rank, told in _document(each).get("ranks", {}).items()}


def _document(ended: Ended) -> dict[str, Any]:
    return json.loads(ended.out) if _is_report(ended.out) else {}


def _is_report(out: str) -> bool:
    return out.startswith("{") and out.endswith("}\n")


def _of_target(
    job: Job, place: Place, struck: Struck, outcome: str, right: Sequence[Result], older: Sequence[Result]
) -> Iterator[str]:
    """The target holds the whole result, or an older one, or nothing that looks like one."""
    if not place.target.is_dir():
        if outcome == RIGHT and not struck.gone:
            yield "it says that it is done, and there is no target"
        return
    found = visible(job, place.target)
    if outcome == RIGHT:
        if not any(found == result.files for result in right) and not (struck.gone and not found):
            yield f"it says that it is done, and holds {_differences(found, right[0].files)}"
        return
    if any(found == result.files for result in (*right, *older)):
        return
    yield from _of_part(job, place.target, found, right, older)
    if outcome == ERROR and not struck.gone:
        partial = [name for name in everything(place.target) if name.endswith(".partial")]
        if partial:
            yield f"left after an error: {partial}"
    yield from (f"left: {name}" for name in everything(place.target) if _is_odd(name))


def _of_part(
    job: Job, target: Path, found: Mapping[str, bytes], right: Sequence[Result], older: Sequence[Result]
) -> Iterator[str]:
    """A target that is neither: files of one result only, each whole, and loaders refuse them."""
    contents = _contents(found)
    if not contents or any(contents.items() == _contents(result.files).items() for result in older):
        return
    if not any(contents.items() <= result.files.items() for result in (*right, *older)):
        yield f"what is in the target is of no single result: {_differences(contents, right[0].files)}"
    if job.indexed and not any(is_unfinished(path) for path in target.glob("*.json")):
        yield f"an incomplete result without a mark that it is: {sorted(found)}"
    if job.indexed and _loads(target):
        yield f"an incomplete result that loads: {sorted(found)}"


def _contents(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files that hold tensors."""
    return {n: held for n, held in files.items() if n.endswith((".safetensors", ".ckpt")) and not n.endswith(OBSTACLE)}


def _loads(target: Path) -> bool:
    try:
        with ms_ckpt_ext.load(target) as found:
            return bool(found.arrays())
    except CheckpointError:
        return False


def _is_odd(name: str) -> bool:
    inside, _, rest = name.partition("/")
    return inside == HIDDEN and not _IN_PROGRESS.match(rest)


def _differences(found: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> str:
    lacking, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    other = sorted(name for name in found.keys() & wanted.keys() if found[name] != wanted[name])
    return f"files that lack: {lacking}, that are other: {other}, that are more: {more}"


def judge_again(job: Job, place: Place, ended: Sequence[Ended], right: Result) -> Iterator[str]:
    """The same job without a fault, afterwards: right, and nothing is left of the first."""
    for each in ended:
        yield from (f"again: {problem}" for problem in _of_process(each))
        if each.code != 0:
            yield f"again: exit code {each.code}: {each.err[-600:]}{each.out[-600:]}"
            return
    found = visible(job, place.target)
    if found != right.files:
        yield f"again: {_differences(found, right.files)}"
    elif frozenset(everything(place.target)) != right.names:
        yield f"again: left {sorted(frozenset(everything(place.target)) - right.names)}"


def changed(before: Mapping[str, bytes], source: Path, may: Collection[str] = ()) -> Iterator[str]:
    """Files of the source that are not what they were."""
    now = {name: (source / name).read_bytes() for name in everything(source)}
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name) and name not in may:
            yield f"the source's {name} was changed"
