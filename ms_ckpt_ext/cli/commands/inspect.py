"""`ms-ckpt inspect`: what is in a checkpoint or a strategy."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ms_ckpt_ext.cli import options, words
from ms_ckpt_ext.cli.command import Answer, Command, takes_path

if TYPE_CHECKING:
    from ms_ckpt_ext.api.inspection import Inspection, ParameterInfo


def _configure(parser: argparse.ArgumentParser) -> None:
    takes_path(parser.add_argument("path", help="checkpoint file or directory, or strategy file or directory"))
    options.add_strategy(parser)
    options.add_filter(parser)
    parser.add_argument("--tree", action="store_true", help="show parameters as a tree of their names, layers folded")
    parser.add_argument("--all", action="store_true", help="list every parameter and scalar")
    options.add_suffix(parser)
    options.add_format(parser)
    options.add_key(parser)
    options.add_mode(parser)


def _run(arguments: argparse.Namespace) -> Answer:
    from ms_ckpt_ext.api.inspect import inspect

    found = inspect(
        arguments.path,
        strategy=arguments.strategy,
        match=arguments.match,
        exclude=arguments.exclude,
        file_suffix=arguments.file_suffix,
        format=arguments.format,
        dec_key=options.key(arguments),
        dec_mode=arguments.dec_mode,
    )
    everything = arguments.all or bool(arguments.match or arguments.exclude)
    return Answer(_data(found), _lines(found, arguments.tree, everything))


def _data(found: Inspection) -> dict[str, Any]:
    redundancy = found.redundancy
    if redundancy is None:
        return found._asdict()
    return {**found._asdict(), "redundancy": {**redundancy._asdict(), "replicas": redundancy.replicas}}


def _lines(found: Inspection, tree: bool, everything: bool) -> Iterator[str]:
    yield from _head(found)
    if found.kind != "strategy":
        yield ""
        rows = [
            [name, f"{g.parameters:,}", words.size(g.nbytes), words.size(g.stored_nbytes)]
            for name, g in found.groups.items()
        ]
        yield from words.table(["group", "parameters", "size", "in files"], rows, "lrrr")
    if found.scalars:
        yield ""
        rows = [[name, "(not shown)" if value is None else str(value)] for name, value in found.scalars.items()]
        yield from words.listed(["scalar", "value"], rows, "", everything)
    yield ""
    if not found.parameters:
        yield "no parameters"
    elif tree:
        from ms_ckpt_ext.cli.tree import tree_lines

        yield from tree_lines([(p.name, _kind(p), p.nbytes) for p in found.parameters])
    else:
        yield from _table(found, everything)
    yield from _differing(found, everything)


def _differing(found: Inspection, everything: bool) -> Iterator[str]:
    """What the strategy does not list and differs between ranks."""
    rows = [[p.name, p.differs] for p in found.parameters if p.differs]
    if rows:
        yield ""
        yield from words.listed(["outside the strategy, by rank", "how ranks differ"], rows, "", everything)


def _head(found: Inspection) -> Iterator[str]:
    told = {
        "strategy": "a strategy",
        "file": "a checkpoint file",
        "sharded": "a sharded checkpoint",
        "merged": "a merged checkpoint",
        "files": "checkpoint files that no map relates to each other",
    }
    yield f"{words.style(found.path, 'bold')}: {told[found.kind]}"
    if found.files:
        kinds = sorted({os.path.splitext(file.path)[1][1:] for file in found.files})
        ciphers = sorted({file.encryption or "" for file in found.files} - {""})
        sealed = f", encrypted ({', '.join(ciphers)})" if ciphers else ""
        total = words.size(sum(file.size for file in found.files))
        yield f"  files       {words.count(len(found.files), 'file')}, {' and '.join(kinds)}{sealed}, {total}"
    ranks = [file.rank for file in found.files if file.rank is not None]
    if ranks:
        yield f"  ranks       {words.ranges(ranks)}"
    if found.strategy is not None:
        s = found.strategy
        stages = words.count(s.stages, "pipeline stage")
        yield f"  strategy    {words.count(s.world, 'rank')}: {stages} of {words.count(s.devices_per_stage, 'device')}"
    elif found.kind == "sharded":
        yield "  strategy    not given: shapes are those of slices; --strategy tells whole shapes and layouts"
    if found.redundancy is not None:
        r = found.redundancy
        replicas = "every slice is on one rank only" if r.replicas == "none" else f"replicas {r.replicas}"
        missing = f", {r.missing:,} missing" if r.missing else ""
        counts = f"{r.slices:,} different, {r.stored:,} in files, {r.expected:,} on ranks"
        yield f"  slices      {counts}: {replicas}{missing}"


def _kind(parameter: ParameterInfo) -> str:
    if not parameter.dtype:
        return "; ".join(dict.fromkeys(info.words for info in parameter.layouts))
    if parameter.shape is None:
        return f"{parameter.dtype} slices {' '.join(map(words.shape, parameter.slice_shapes))}"
    return f"{parameter.dtype} {words.shape(parameter.shape)}"


def _table(found: Inspection, everything: bool) -> Iterator[str]:
    if found.kind == "strategy":
        heads = ["parameter", "stage", "device matrix", "cut", "copies"]
        rows = [
            [p.name, str(info.stage), words.shape(info.device_matrix), info.words, str(info.copies)]
            for p in found.parameters
            for info in p.layouts
        ]
        yield from words.listed(heads, rows, "lrllr", everything)
        return
    heads = ["parameter", "dtype", "shape", "size"]
    rows = [
        [p.name, p.dtype, words.shape(p.shape) if p.shape is not None else "?", words.size(p.nbytes)]
        for p in found.parameters
    ]
    if found.kind == "sharded":
        heads += ["slice", "slices", "copies"]
        for row, p in zip(rows, found.parameters):
            row += [" ".join(map(words.shape, p.slice_shapes)), "?" if p.slices is None else str(p.slices), _copies(p)]
    if found.strategy is not None:
        heads.append("cut")
        for row, p in zip(rows, found.parameters):
            cut = "; ".join(dict.fromkeys(info.words for info in p.layouts))
            row.append("each rank's own" if p.differs else cut)
    yield from words.listed(heads, rows, "lllrlrr", everything)


def _copies(parameter: ParameterInfo) -> str:
    """Copies in the files, and of how many on the ranks where that differs."""
    if parameter.copies is None or parameter.copies_expected is None:
        return "?"
    held, expected = (("-".join(map(str, dict.fromkeys(c)))) for c in (parameter.copies, parameter.copies_expected))
    return held if held == expected or not parameter.layouts else f"{held} of {expected}"


COMMAND = Command(
    name="inspect",
    summary="show what is in a checkpoint or a strategy",
    description=(
        "Show what is in a checkpoint (a file, rank folders, a merged or Hugging Face directory; safetensors or\n"
        ".ckpt, plain or encrypted) or in a strategy: parameters, dtypes, shapes, layouts, sizes by group, training\n"
        "scalars, copies. It reads headers, scalars, and samples of what the strategy does not list, where ranks may\n"
        "differ."
    ),
    examples=(
        ("ms-ckpt inspect checkpoint --strategy strategy.ckpt", "rank folders, with whole shapes and layouts"),
        ("ms-ckpt inspect merged --tree", "as a tree, equal layers folded"),
        ("ms-ckpt inspect checkpoint --match 'layers.0.*' --exclude '*.bias'", "some parameters"),
        ("ms-ckpt inspect strategy.ckpt --json | jq .strategy.world", "how many ranks a strategy is for"),
    ),
    configure=_configure,
    run=_run,
)
