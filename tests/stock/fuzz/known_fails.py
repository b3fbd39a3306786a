"""One side fails: mostly stock, ours where the input is wrong."""

from __future__ import annotations

import re

from tests.stock.fuzz.found import Found


def _device_counts(found: Found) -> bool:
    return found.stock_says("Cannot transform device_num from") or (
        found.kind("silent") and "Cannot transform device_num from" in found.difference.told
    )


def _dash(found: Found) -> bool:
    return found.stock_says("invalid literal for int()", "too many values to unpack") and any(
        "-" in name for name in found.case.model.parameters
    )


def _json_strategy(found: Found) -> bool:
    given = [*found.case.arguments, *found.case.named.values()]
    return (
        found.kind("served", "error type")
        and any(str(getattr(value, "path", "")).endswith(".json") for value in given)
        and type(found.stock.error).__name__ in ("TypeError", "DecodeError", "KeyError", "IndexError")
    )


def _lone_axis(found: Found) -> bool:
    """A parameter of one axis under several device axes."""
    lone = any(
        len(cut.tensor_map) == 1 and cut.nested
        for job in found.jobs for stages in job.cuts.values() for cut in stages.values()
    )  # fmt: skip
    return lone and found.stock_says("the tensor map dimensions must match", "not supported between instances")


def _nested_ckpt(found: Found) -> bool:
    """Several device axes on a tensor axis, in loads of `.ckpt` files."""
    return found.stock_says("'>=' not supported between instances of 'list' and 'int'")


def _sealed_with_checksum(found: Found) -> bool:
    return found.kind("served") and {"crc_check", "dec_key"} <= found.case.named.keys()


def _empty_layouts(found: Found) -> bool:
    return found.stock_says("'strategy_filename' should be string, but got <class 'dict'>")


def _no_strategy(found: Found) -> bool:
    """One whole `.ckpt` file into a network, and no strategy."""
    return found.stock_says("no such strategy file: .") and found.case.model.source.world == 1


def _nothing_in_a_strategy(found: Found) -> bool:
    return found.stock_says("None of the parameters in checkpoint file are in either")


def _accident(found: Found) -> bool:
    """An error in stock that says nothing about the input: an index, a key, a C++ assertion."""
    error = found.stock.error
    return found.kind("served") and (
        isinstance(error, (IndexError, KeyError, UnboundLocalError)) or "C++ Call Stack" in str(error)
    )


def _none_processes(found: Found) -> bool:
    named = found.case.named
    return found.kind("served") and any(name.endswith("_num") and not named[name] for name in named)


def _integers(found: Found) -> bool:
    return found.stock_says("should be a int")


def _nothing_to_convert(found: Found) -> bool:
    return found.kind("refused") and bool(re.search(r"holds no \S+ file to convert", str(found.ours.error)))


def _mistakes(found: Found) -> bool:
    """Input that is wrong, which stock takes without a word: an error by name, before anything is written. Files of
    several ranks without a strategy: ours takes rank 0's for the whole, stock all that they hold."""
    if "mistake" not in found.case.tags:
        return False
    if found.kind("names"):
        return "src_strategy_file" in found.case.named and found.case.named["src_strategy_file"] is None
    ours = type(found.ours.error).__module__ == "ms_ckpt_ext.errors"
    return found.kind("refused") and ours and not found.ours.files


def _types(found: Found) -> bool:
    return found.kind("error type") and isinstance(found.ours.error, TypeError)


RULES = {
    "device counts": _device_counts,
    "a dash in a name": _dash,
    "strategies in JSON": _json_strategy,
    "a lone axis under several device axes": _lone_axis,
    "several device axes in loads of .ckpt": _nested_ckpt,
    "a checksum under encryption": _sealed_with_checksum,
    "empty layouts": _empty_layouts,
    "no strategy for one file": _no_strategy,
    "no parameter in a strategy": _nothing_in_a_strategy,
    "errors that stock did not mean": _accident,
    "no number of processes": _none_processes,
    "integers of any kind": _integers,
    "nothing to convert": _nothing_to_convert,
    "mistakes that stock does not see": _mistakes,
    "arguments of a wrong type": _types,
}
