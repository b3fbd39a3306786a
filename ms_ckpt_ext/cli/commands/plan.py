"""`ms-ckpt plan SRC DST`: what a load would read, move and cost, without carrying it out."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Optional

from ms_ckpt_ext.cli import options, words
from ms_ckpt_ext.cli.command import Answer, Command, takes_path
from ms_ckpt_ext.errors import UsageError

if TYPE_CHECKING:
    from ms_ckpt_ext.api.dry_run.report import PlanReport, Spread

NONE = "none"


def _configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    takes_path(
        add("src", metavar="SRC", help="checkpoint directory; with --shapes the strategy that cut it, or 'none'")
    )
    takes_path(add("dst", metavar="DST", help="strategy of the job that loads; 'none' for one device"))
    takes_path(
        add(
            "--src-strategy",
            "--strategy",
            metavar="FILE",
            action=options.Gather,
            help="strategy of the job that saved SRC, if in rank folders; may be repeated, with what the first lacks",
        )
    )
    takes_path(
        add(
            "--dst-strategy",
            metavar="FILE",
            action=options.Gather,
            help="strategy of the job that loads, where DST is a directory; may be repeated, as --src-strategy",
        )
    )
    takes_path(add("--shapes", metavar="FILE", help='no checkpoint: JSON {name: {"dtype": "F32", "shape": [..]}}'))
    add(
        "--hardware",
        action="append",
        metavar="NAME|FILE",
        help="profile to predict times for; may be repeated (default: all that are included). The first also says how "
        "ranks lie on servers and how large a round may be",
    )
    add("--mode", choices=("auto", "direct", "cooperative"), default="auto", help="what the job will ask for")
    add(
        "--bucket",
        type=options.byte_size,
        default=None,
        metavar="SIZE",
        help="staging memory of a rank, e.g. 64M (default: what fits the first machine)",
    )
    add("--prefetch", type=int, default=1, metavar="N", help="rounds that are read ahead (default 1)")
    add(
        "--transfer",
        action="store_true",
        help="from Parameters under strategy SRC to Parameters under DST, without storage; with --shapes",
    )
    add(
        "--other-ranks",
        action="store_true",
        help="of a transfer: DST's ranks are numbered after SRC's (default: rank i is the same process in both)",
    )
    add(
        "--no-groups",
        action="store_true",
        help="the job has no groups of its replicas (a network that is not compiled for training): each is sent a copy",
    )
    takes_path(add("--html", metavar="FILE", help="also write a page with matrices, rounds and layouts to FILE"))
    options.add_suffix(parser)
    options.add_format(parser)
    options.add_key(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    from ms_ckpt_ext.api.dry_run.plan import plan

    saved: Any = arguments.src_strategy
    if arguments.shapes is not None:
        if saved is not None:
            raise UsageError("with --shapes, SRC is the strategy that cut the checkpoint: leave --src-strategy away")
        saved = None if arguments.src == NONE else arguments.src
    target = arguments.dst_strategy or (None if arguments.dst == NONE else arguments.dst)
    report = plan(
        None if arguments.shapes is not None else arguments.src,
        target,
        src_strategy=saved,
        shapes=arguments.shapes,
        hardware=arguments.hardware,
        mode=arguments.mode,
        bucket_bytes=arguments.bucket,
        prefetch=arguments.prefetch,
        html=arguments.html,
        groups=not arguments.no_groups,
        file_suffix=arguments.file_suffix,
        format=arguments.format,
        dec_key=options.key(arguments),
        transfer=arguments.transfer,
        other_ranks=arguments.other_ranks,
    )
    return Answer(report.to_dict(), lines(report, arguments.html))


def lines(report: PlanReport, html: Optional[str] = None) -> Iterator[str]:
    """The report as text."""
    loaded = words.count(report.parameters, "parameter")
    yield words.style(f"{loaded}, {words.size(report.unique)}, by {words.count(report.ranks, 'rank')}", "bold")
    moved = report.kept is not None
    yield f"  from {report.source}, {words.count(report.files, 'rank' if moved else 'file')}"
    yield f"  as   {report.target}"
    where = "by the ranks" if moved else "in the files"
    yield f"  held {report.source_copies:.1f} times {where}, wanted {report.target_copies:.1f} times"
    yield ""
    yield from words.table(("per rank", "least", "mean", "most", "all ranks"), list(_rows(report)), "lrrrr")
    yield ""
    yield from _ways(report)
    yield (
        f"{words.count(len(report.rounds), 'round')} of at most {words.size(report.bucket)} of staging memory a rank; "
        f"the busiest {'sender' if moved else 'reader'} has {report.balance:.2f} times a fair share"
    )
    yield ""
    yield from _times(report)
    yield words.style("  counts are exact; times are orders of magnitude (docs/plan.md)", "dim")
    if report.mode != "auto":
        yield f"  the job asks for {report.mode} mode"
    if html is not None:
        yield f"page: {html}"


def _times(report: PlanReport) -> Iterator[str]:
    predicted = report.predictions
    if report.kept is not None:
        times = [(p.profile, seconds(p.cooperative_seconds), seconds(p.direct_seconds)) for p in predicted]
        yield from words.table(("predicted time", "transfer", "read from storage instead"), times, "lrr")
        return
    heads = ("predicted time", "direct", "cooperative", "auto chooses")
    modes = [(p.profile, seconds(p.direct_seconds), seconds(p.cooperative_seconds), p.auto) for p in predicted]
    yield from words.table(heads, modes, "lrrl")


def _ways(report: PlanReport) -> Iterator[str]:
    """How ranks lie on servers, and how bytes travel."""
    gathering = f", {words.count(report.groups, 'group')} of ranks gather" if report.groups else ""
    if report.servers == 1:
        yield f"one server{gathering}; {words.count(report.calls, 'collective')} of a rank"
        return
    how = "crosses once and is spread inside" if report.way == "tiered" else "is sent to each of them"
    yield (
        f"{words.count(report.servers, 'server')}, {report.way}: what several ranks of one want {how}{gathering}; "
        f"{words.count(report.calls, 'collective')} of a rank"
    )
    mean, most = words.size(report.crossing.mean), words.size(report.crossing.most)
    yield f"  to a server from others: {mean} on average, {most} at most"


def _rows(report: PlanReport) -> Iterator[tuple[str, ...]]:
    yield _row("wanted", report.direct["wanted"], True)
    if report.kept is not None:
        yield _row("held already", report.kept, True)
    else:
        about = "" if report.direct_counted == report.ranks else ", about"
        yield _row(f"read, direct{about}", report.direct["read"], True)
    for name, told in (
        ("read", "read, cooperative"),
        ("sent", "sent"),
        ("received", "received"),
        ("inside", "sent inside a server"),
        ("between", "sent between servers"),
        ("messages", "messages"),
        ("reads", "read calls"),
        ("staging", "staging memory"),
    ):
        if report.kept is not None and name in ("read", "reads"):
            continue
        yield _row(told, report.cooperative[name], name not in ("messages", "reads"), total=name != "staging")


def _row(told: str, spread: Spread, is_size: bool, total: bool = True) -> tuple[str, ...]:
    def show(value: float) -> str:
        return words.size(value) if is_size else f"{round(value):,}"

    def at(value: int, rank: int) -> str:
        return show(value) if spread.least == spread.most else f"{show(value)} (rank {rank})"

    ends = (at(spread.least, spread.least_rank), show(spread.mean), at(spread.most, spread.most_rank))
    return (told, *ends, show(spread.total) if total else "")


def seconds(value: float) -> str:
    """A duration, no more precise than a prediction may be.

    >>> seconds(0.00004), seconds(0.0123), seconds(4.56), seconds(200), seconds(7300)
    ('40 us', '12 ms', '4.6 s', '3.3 min', '2.0 h')
    """
    for unit, factor, limit in (("us", 1e6, 1e-3), ("ms", 1e3, 1.0), ("s", 1.0, 100.0), ("min", 1 / 60, 6000.0)):
        if value < limit:
            shown = value * factor
            return f"{shown:.{0 if shown >= 10 else 1}f} {unit}"
    return f"{value / 3600:.1f} h" if math.isfinite(value) else "never"


COMMAND = Command(
    name="plan",
    summary="the dry run of a load: bytes, messages, rounds, memory, time",
    description=(
        "Plan the load of a checkpoint by every rank of a job, without carrying it out: what each rank reads, sends,\n"
        "receives and holds, in how many rounds, and how long that takes on named machines.\n\n"
        "From a checkpoint's headers, or from parameter shapes alone (--shapes), for up to many thousands of ranks."
    ),
    examples=(
        ("ms-ckpt plan ckpt/ serve.ckpt --src-strategy train.ckpt", "shards of a training job, by a serving job"),
        ("ms-ckpt plan merged/ serve.ckpt --html plan.html", "a merged checkpoint; a page to look at as well"),
        ("ms-ckpt plan train.ckpt resume.ckpt --shapes shapes.json --hardware atlas-800t-a2", "before anything exists"),
        ("ms-ckpt plan train.ckpt serve.ckpt --transfer --shapes shapes.json", "from network to network"),
    ),
    configure=_configure,
    run=_run,
)
