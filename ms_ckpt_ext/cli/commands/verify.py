"""`ms-ckpt verify`: proof that a checkpoint is what it should be."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Union

from ms_ckpt_ext.cli import options, words
from ms_ckpt_ext.cli.command import Answer, Command, Exit, takes_path
from ms_ckpt_ext.errors import UsageError

if TYPE_CHECKING:
    from ms_ckpt_ext.engine.integrity.compare import Comparison, Difference
    from ms_ckpt_ext.engine.integrity.folder import ManifestCheck
    from ms_ckpt_ext.engine.integrity.soundness import Health


def _configure(parser: argparse.ArgumentParser) -> None:
    takes_path(parser.add_argument("a", help="checkpoint file or directory"))
    takes_path(parser.add_argument("b", nargs="?", help="another one; without it, a is checked by itself"))
    parser.add_argument(
        "--manifest", action="store_true", help="compare a with the digests in its ms_ckpt_ext.digests.json"
    )
    options.add_strategy(parser, whose="of the job that saved a")
    options.add_strategy(parser, "--strategy-b", "of the job that saved b")
    options.add_filter(parser)
    options.add_name_map(parser, '{"name in b": "name in a"}')
    options.add_equal_slices(parser)
    finite = "checked by itself: a NaN or an infinity is a fault too (else they are counted only)"
    parser.add_argument("--finite", action="store_true", help=finite)
    parser.add_argument("--all", action="store_true", help="list everything that was found")
    options.add_suffix(parser)
    options.add_suffix(parser, "--file-suffix-b")
    options.add_key(parser, whose="of a")
    options.add_key(parser, whose="of b", suffix="-b")
    options.add_mode(parser)
    options.add_mode(parser, whose="of b", suffix="-b")
    options.add_workers(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    from ms_ckpt_ext.api.verify import verify
    from ms_ckpt_ext.engine.integrity.compare import Comparison
    from ms_ckpt_ext.engine.integrity.folder import ManifestCheck

    if arguments.finite and (arguments.b or arguments.manifest):
        raise UsageError("--finite is for a checkpoint that is checked by itself: leave out b and --manifest")
    begin = time.monotonic()
    found = verify(
        arguments.a,
        arguments.b,
        manifest=arguments.manifest,
        match=arguments.match,
        exclude=arguments.exclude,
        name_map=options.name_map(arguments),
        max_process_num=arguments.workers,
        allow_equal_slices=arguments.allow_equal_slices,
        **_sides(arguments),
    )
    seconds = time.monotonic() - begin
    if isinstance(found, Comparison):
        return _answer(found, found.ok, _compared(found, seconds, arguments.all))
    if isinstance(found, ManifestCheck):
        return _answer(found, found.ok, _by_manifest(found, seconds, arguments.all))
    ok = found.ok and not (arguments.finite and found.not_finite)
    return _answer(found, ok, _by_itself(found, ok, seconds, arguments.all))


def _sides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments that both checkpoints have, those of the second with `_b`."""
    told: dict[str, Any] = {}
    for side in ("", "_b"):
        for name in ("strategy", "file_suffix", "dec_mode"):
            told[name + side] = getattr(arguments, name + side)
        told[f"dec_key{side}"] = options.key(arguments, suffix=side)
    return told


def _answer(found: Union[Comparison, Health, ManifestCheck], ok: bool, lines: Iterator[str]) -> Answer:
    from ms_ckpt_ext.cli.records import plain

    told = plain(found)
    for name in ("damaged", "unchecked"):
        for each in told.get(name, ()):
            each["reason"] = each["found"]
    return Answer({"ok": ok, **told}, lines, Exit.FINE if ok else Exit.DIFFERENT)


def _verdict(ok: bool, good: str, bad: str) -> str:
    return words.style(good, "green") if ok else words.style(bad, "red")


def _read(nbytes: int, seconds: float) -> str:
    return f"{words.size(nbytes)} in {seconds:.1f} s ({words.size(nbytes / max(seconds, 1e-9))}/s)"


def _compared(found: Comparison, seconds: float, everything: bool) -> Iterator[str]:
    counts = f"{words.count(found.parameters, 'parameter')}, {_read(found.nbytes, seconds)}"
    if found.ok:
        yield f"{_verdict(True, 'Same', '')}: {counts}, equal bit for bit"
        return
    parts = [
        f"{len(found.differences):,} with other values",
        f"{len(found.mismatches):,} with another dtype or shape",
        f"{len(found.only_a):,} only in a",
        f"{len(found.only_b):,} only in b",
    ]
    yield f"{_verdict(False, '', 'Different')}: {', '.join(parts)}; compared {counts}"
    if found.differences:
        yield ""
        heads = ["parameter", "dtype", "shape", "differ", "of", "max abs", "max ulp", "NaN", "first at"]
        yield from words.listed(heads, [_row(d) for d in found.differences], "lllrrrrrl", everything)
    if found.mismatches:
        yield ""
        rows = [[m.name, m.a, m.b] for m in found.mismatches]
        yield from words.listed(["dtype or shape", "in a", "in b"], rows, "", everything)
    for side, names in (("a", found.only_a), ("b", found.only_b)):
        if names:
            yield ""
            yield from words.listed([f"only in {side}"], [[name] for name in names], "", everything)


def _row(found: Difference) -> list[str]:
    first = found.first[0]
    largest = "-" if found.max_abs is None else f"{found.max_abs:.3g}" if isinstance(found.max_abs, float) else ""
    return [
        f"{found.name}, {found.of}" if found.of else found.name,
        found.dtype,
        words.shape(found.shape),
        f"{found.count:,}",
        f"{found.total:,}",
        largest or f"{found.max_abs:,}",
        "-" if found.max_ulp is None else f"{found.max_ulp:,}",
        f"{found.nans:,}",
        f"{words.shape(first.at)}: {first.a} and {first.b}",
    ]


def _by_itself(found: Health, ok: bool, seconds: float, everything: bool) -> Iterator[str]:
    counts = f"{words.count(found.parameters, 'parameter')} in {words.count(found.files, 'file')}"
    yield f"{_verdict(ok, 'Sound', 'Faulty')}: {counts}, {_read(found.nbytes, seconds)}"
    missing = len(found.absent) + len({gap.name for gap in found.gaps})
    yield f"  complete    {'yes' if not missing else words.count(missing, 'parameter') + ' missing or incomplete'}"
    copies = words.count(found.copies_compared, "slice with another copy", "slices with other copies")
    equal = words.count(len(found.unequal), "that differs", "that differ") if found.unequal else "equal"
    yield f"  copies      {copies}: {equal}" if found.copies_compared else "  copies      none to compare"
    if found.outside:
        named = words.count(len(found.outside), "of these is", "of these are")
        yield f"  outside     {named} not in the strategy: cut without its saying so, or each rank's own"
    if found.gathered is not None:
        yield f"  slices      {found.gathered}: saved with integrated_save=True?"
    if found.checksums:
        fit = "all right" if not found.damaged else f"{len(found.damaged):,} wrong"
        yield f"  checksums   {words.count(found.checksums, 'file')}: {fit}"
    nans, infinities = (sum(getattr(p, field) for p in found.not_finite) for field in ("nans", "infinities"))
    where = f", in {words.count(len(found.not_finite), 'parameter')}" if found.not_finite else ""
    yield f"  values      {nans:,} NaN, {infinities:,} infinite{where}"
    yield from _faults(found, everything)


def _faults(found: Health, everything: bool) -> Iterator[str]:
    tables = (
        (["in no file"], [[name] for name in found.absent]),
        (["missing", "region", "in the file of rank"], [[g.name, g.region, words.ranges(g.ranks)] for g in found.gaps]),
        (
            ["copies differ", "region", "files"],
            [[u.name, u.region, " | ".join(", ".join(group) for group in u.groups)] for u in found.unequal],
        ),
        (["damaged", "because"], [[d.file, d.reason] for d in found.damaged]),
        (["not finite", "NaN", "infinite"], [[p.name, f"{p.nans:,}", f"{p.infinities:,}"] for p in found.not_finite]),
    )
    for heads, rows in tables:
        if rows:
            yield ""
            yield from words.listed(heads, rows, "lrr" if heads[0] == "not finite" else "", everything)


def _by_manifest(found: ManifestCheck, seconds: float, everything: bool) -> Iterator[str]:
    counts = f"{words.count(found.tensors, 'tensor')} in {words.count(found.files, 'file')}"
    bad = "Damaged" if found.faults else "Not checked in full"
    yield f"{_verdict(found.ok, 'As written', bad)}: {counts}, {_read(found.nbytes, seconds)}"
    if found.faults:
        yield ""
        rows = [[f.file, f.tensor or "(the file)", f.found, f.expected] for f in found.faults]
        yield from words.listed(["file", "tensor", "found", "in the manifest"], rows, "", everything)
    if found.unchecked:
        yield ""
        yield from words.listed(
            ["not checked", "because it is"], [[u.file, u.reason] for u in found.unchecked], "", everything
        )
    if found.unlisted:
        yield ""
        yield from words.listed(["in no manifest"], [[path] for path in found.unlisted], "", everything)


COMMAND = Command(
    name="verify",
    summary="compare two checkpoints bit for bit, or check one by its digests or by itself",
    description=(
        "Are two checkpoints the same model? Layouts, formats and encryption may differ; values are compared bit for\n"
        "bit, in memory that does not grow with the model. With one checkpoint: against the digests that were written\n"
        "with it (--manifest), or by itself: is every slice there, are all copies of a slice equal, what is NaN or\n"
        "infinite? Either way the checksums that files carry are verified. Exit code 1 when differences or faults are\n"
        "found, or when --manifest cannot check an encrypted file."
    ),
    examples=(
        ("ms-ckpt verify checkpoint merged --strategy strategy.ckpt", "is the merge of these rank folders right?"),
        ("ms-ckpt verify old new --strategy old.ckpt --strategy-b new.ckpt", "two layouts of one model"),
        ("ms-ckpt verify checkpoint hf --strategy s.ckpt --exclude 'adam_*'", "weights only"),
        ("ms-ckpt verify merged --manifest", "is every tensor as it was written?"),
        ("ms-ckpt verify checkpoint --strategy strategy.ckpt --finite", "complete, equal copies, no NaN"),
    ),
    configure=_configure,
    run=_run,
)
