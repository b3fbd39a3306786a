"""MindFormers' conversion templates as weight rules: its `weight_converters` are taken as they are.

MindFormers converts what a rank has already sliced, so its operators divide heads and experts by the parallel sizes. A
rule speaks of whole parameters and the planner slices, which gives the same bytes wherever MindFormers' way works, and
also where it does not (more tensor-parallel ranks than query groups, a cut through a transposed expert).

A network may have its weights in another arrangement, of equal names and shapes, which the operators do not know; what
the network's configuration says comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Callable

from ms_ckpt_ext.core.planning.rule import Rule
from ms_ckpt_ext.core.planning.weight_rules import QKV, Concat, Experts, Interleave, Part, Rename, Stack
from ms_ckpt_ext.errors import UnsupportedError

_HOME = "mindformers.checkpoint.converter"


def rules_of(converters: Iterable[Any]) -> tuple[Rule, ...]:
    """The rules of a `WeightTemplate.weight_converters`, configured for its model.

    Raises:
        UnsupportedError: an operator that is not one of MindFormers' own; names it.
    """
    return tuple(rule for converter in converters for rule in _rules(converter))


def rules_for(network: Any) -> tuple[Rule, ...]:
    """The rules of the converters of a network that has a template, in the network's own arrangement of weights.

    Raises UnsupportedError as `rules_of`.
    """
    config = getattr(network, "transformer_config", None)
    apart = getattr(config, "use_contiguous_weight_layout_attention", False)
    by_row = getattr(config, "use_interleaved_weight_layout_mlp", True)
    return tuple(_arranged(rule, apart, by_row) for rule in rules_of(network.template.weight_converters))


def _arranged(rule: Rule, apart: bool, by_row: bool) -> Rule:
    """A rule, or one that puts its sources one after another."""
    if isinstance(rule, QKV) and apart:
        return Concat(rule.sources, rule.target, rule.axis, rule.shares)
    if isinstance(rule, Interleave) and not by_row and ".linear_fc1." in rule.target:
        return Concat(rule.sources, rule.target, rule.axis, (1,) * len(rule.sources))
    return rule


def _rules(converter: Any) -> list[Rule]:
    kind = type(converter).__name__
    if not type(converter).__module__.startswith(_HOME) or kind not in _KINDS:
        raise UnsupportedError(
            f"the weight converter {type(converter).__module__}.{kind} of {converter.mf_names} is not one that "
            f"ms_ckpt_ext knows ({', '.join(_KINDS)})",
            kind,
        )
    return _KINDS[kind](converter)


def _single(converter: Any) -> str:
    if len(converter.mf_names) != 1:
        kind = type(converter).__name__
        raise UnsupportedError(f"{kind} to several parameters ({converter.mf_names}) is not defined", kind)
    return str(converter.mf_names[0])


def _concat(converter: Any) -> list[Rule]:
    """Row by row unless the converter says otherwise, which MindFormers 2.0 cannot express."""
    if getattr(converter, "interleaved", True):
        return [Interleave(converter.hf_names, _single(converter), axis=converter.dim)]
    return [Concat(converter.hf_names, _single(converter), axis=converter.dim)]


def _qkv(converter: Any) -> list[Rule]:
    groups = int(converter.num_query_groups)
    heads = getattr(converter, "num_attention_heads", None)
    shares = None if heads is None or heads % groups else (int(heads) // groups, 1, 1)
    return [QKV(converter.hf_names, _single(converter), groups=groups, shares=shares)]


def _experts(converter: Any) -> list[Rule]:
    """Gate and up are equally wide: MindFormers cuts them so."""
    names, count = converter.hf_names, getattr(converter, "num_moe_experts", None)
    shares = (1,) * len(names)
    return [Experts(names, _single(converter), experts=None if count is None else int(count), shares=shares)]


def _split(converter: Any) -> list[Rule]:
    names = converter.mf_names
    return [Part(converter.hf_names, name, number, len(names)) for number, name in enumerate(names)]


_KINDS: Mapping[str, Callable[[Any], list[Rule]]] = {
    "RenameConvertOp": lambda op: [Rename(op.hf_names, _single(op))],
    "ConcatConvertOp": _concat,
    "ExpertsConvertOp": _experts,
    "StackConvertOp": lambda op: [Stack(op.hf_names, _single(op), axis=op.dim)],
    "QKVConvertOp": _qkv,
    "QKVBiasConvertOp": _qkv,
    "ScaleSplitConvertOp": _split,
}
