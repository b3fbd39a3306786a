"""The contents of a rule file: checked, and turned into weight rules.

    {"title": "what it is for",
     "architectures": ["Qwen3ForCausalLM"],                    of config.json; optional
     "defaults": {"tie_word_embeddings": false},               where config.json has no such key; MindFormers' switches
     "bounds": {"layer": "num_hidden_layers"},                 placeholders that stop below a number
     "tied": {"lm_head.weight": "model.embed_tokens.weight"},  one tensor where tie_word_embeddings is true
     "leave": ["layers.{layer}.expert_load"],                  parameters of a training that are no weights
     "keep": ["model.layers.{layer}.gate.bias"],               Hugging Face's names of what keeps its dtype in an export
     "shapes": {"lm_head.weight": ["vocab_size", "hidden_size"]},  of exported tensors, checked with config.json
     "rules": [{"rule": "QKV", "sources": ["…q…", "…k…", "…v…"], "target": "…", "groups": "num_key_value_heads"}]}

A rule is a class of `ms_ckpt_ext.rules` and its arguments, from Hugging Face's names to those of the training. Numbers
may be given by keys of config.json (`engine.huggingface.sizes`), in names as `{=key}`; `{low<=layer<high}` bounds a
placeholder. `when` and `unless` make a rule depend on keys. `optional` is true where a parameter may be absent, or
words: of the rules that share one, one must have made something for every layer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, Callable, NamedTuple, Optional

from ms_ckpt_ext import rules as weight_rules
from ms_ckpt_ext.core.geometry.array import Shape
from ms_ckpt_ext.core.planning.name_patterns import Pattern
from ms_ckpt_ext.core.planning.rule import Rule
from ms_ckpt_ext.engine.huggingface.sizes import Config, Sizes
from ms_ckpt_ext.errors import UsageError

_KNOWN = {name: getattr(weight_rules, name) for name in weight_rules.__all__}
KINDS: Mapping[str, type[Rule]] = {n: kind for n, kind in _KNOWN.items() if isinstance(kind, type) and kind is not Rule}
"""The classes of rules, by name."""
_TOP = {
    "title": (str, "a text"),
    "architectures": (list, "a list of names"),
    "defaults": (dict, "an object"),
    "bounds": (dict, "an object: placeholder -> number"),
    "tied": (dict, "an object: name -> name"),
    "leave": (list, "a list of names"),
    "keep": (list, "a list of names"),
    "shapes": (dict, "an object: name -> list of numbers or keys of config.json"),
    "rules": (list, "a list of rules"),
}
_OWN = {"rule", "sources", "target", "when", "unless", "optional"}
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
_MOST = 100_000
"""Layers or experts: above what any model has."""
_MOST_NAMES = 1 << 20
"""Parameters that all rules together may require: every one is looked for."""
_NUMBER = re.compile(r"\{=([^{}]+)\}")
_BOUNDED = re.compile(r"\{(?:([^{}<]+)<=)?(\w+)(?:<([^{}<]+))?\}")


class _Need(NamedTuple):
    """A parameter required for every value of its placeholders; with words, it or another that shares one of them."""

    target: str
    words: tuple[str, ...]


class Family(NamedTuple):
    """The rules of a family of models, for one model of it.

    Attributes:
        origin: the rule file.
        rules: from Hugging Face's names to those of the training.
        needs: parameters that the model must have.
        leaves: names, with placeholders, of what a training holds besides its weights.
        keeps: Hugging Face's names, with placeholders, of what keeps its dtype.
        tied: Hugging Face's name -> name of the tensor that it equals, where the model ties its embeddings.
        shapes: (Hugging Face's name, with placeholders, shape), where config.json gives all numbers.
        switches: keys for which the file has defaults.
    """

    origin: str
    rules: tuple[Rule, ...]
    needs: tuple[_Need, ...]
    leaves: tuple[str, ...]
    keeps: tuple[str, ...]
    tied: Mapping[str, str]
    shapes: tuple[tuple[str, Shape], ...]
    switches: tuple[str, ...]

    @property
    def back(self) -> list[Rule]:
        """The rules for an export: weights that were quantised are exported as the floats that training uses.

        Raises UsageError as `invert`.
        """
        return weight_rules.invert([rule for rule in self.rules if not isinstance(rule, weight_rules.Dequantize)])

    def missing(self, names: Container[str]) -> list[str]:
        """Parameters of the training that the model has and `names` lacks; of alternatives the first one."""
        alternatives: dict[tuple[str, ...], list[str]] = {}
        for need in self.needs:
            for name, values in Pattern(need.target).every():
                for key in [(word, *values) for word in need.words] or [(name,)]:
                    alternatives.setdefault(key, []).append(name)
        lacking = (found[0] for found in alternatives.values() if not any(name in names for name in found))
        return list(dict.fromkeys(lacking))


def family_of(document: Any, origin: str, config: Config, given: Mapping[str, Any]) -> Family:
    """The rules that a rule file has for a model.

    Args:
        document: the file's contents.
        origin: its path, for messages.
        config, given: see `Sizes`.

    Raises:
        UsageError: the contents are not as they should be; names file, rule, key, and what is expected.
    """
    _check_top(document, origin)
    sizes = Sizes(given, config, document.get("defaults", {}))
    names = _Names(sizes, document.get("bounds", {}))
    rules: list[Rule] = []
    needs: list[_Need] = []
    names_needed = 0
    for number, entry in enumerate(document["rules"], 1):
        where = f"rule file {origin!r}: rule {number}"
        _check_entry(entry, where)
        where += f" ({entry['rule']} to {entry['target']!r:.80})"
        if not _holds(entry, sizes, where):
            continue
        rule = _rule(entry, names, where)
        rules.append(rule)
        optional = entry.get("optional", False)
        if optional is not True and not isinstance(rule, weight_rules.Duplicate):
            needs.append(_Need(rule.target, _words(optional)))
            names_needed += Pattern(rule.target).count()
            if names_needed > _MOST_NAMES:
                raise UsageError(
                    f"{where}: with it the rules require {names_needed:,} parameters, more than any model has: check "
                    f"the numbers in {repr(config.path) if config.path else 'the sizes'}"
                )
    leaves, keeps = (
        tuple(_told(f"rule file {origin!r}: {key!r} speaks of", names.of, name) for name in document.get(key, []))
        for key in ("leave", "keep")
    )
    shapes = tuple(_shapes(document.get("shapes", {}), names, f"rule file {origin!r}: 'shapes'"))
    tied = document.get("tied", {}) if _tied(sizes) else {}
    return Family(origin, tuple(rules), tuple(needs), leaves, keeps, tied, shapes, tuple(document.get("defaults", {})))


def _shapes(document: Mapping[str, Any], names: _Names, where: str) -> Iterator[tuple[str, Shape]]:
    """The shapes whose numbers are all known."""
    for name, extents in document.items():
        if not isinstance(extents, list):
            raise UsageError(f"{where}: {name!r} must be a list of numbers or keys of config.json, got {extents!r:.60}")
        try:
            yield names.of(name), tuple(names.sizes.number(extent) for extent in extents)
        except UsageError:  # config.json does not say it
            continue


def _words(optional: Any) -> tuple[str, ...]:
    return () if optional is False else (optional,) if isinstance(optional, str) else tuple(optional)


def family_of_rules(rules: Sequence[Rule], config: Config, given: Mapping[str, Any]) -> Family:
    """Rules that belong to no family: only `config` says what the model has besides them."""
    return Family("", tuple(rules), (), (), (), TIED if _tied(Sizes(given, config, {})) else {}, (), ())


def _check_top(document: Any, origin: str) -> None:
    if not isinstance(document, dict) or "rules" not in document:
        raise UsageError(f"rule file {origin!r}: an object with a list of 'rules' is expected, got {document!r:.60}")
    for key, value in document.items():
        if key not in _TOP:
            raise UsageError(f"rule file {origin!r} has no key {key!r}; it may have {', '.join(_TOP)}")
        kind, expected = _TOP[key]
        texts = [*value.values()] if key == "tied" and isinstance(value, dict) else value
        if not isinstance(value, kind) or (
            key in ("tied", "leave", "keep", "architectures") and not all(isinstance(text, str) for text in texts)
        ):
            raise UsageError(f"rule file {origin!r}: {key!r} must be {expected}, got {value!r:.60}")


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or entry.get("rule") not in [*KINDS]:
        raise UsageError(f"{where}: an object whose 'rule' is one of {', '.join(KINDS)} is expected, got {entry!r:.80}")
    sources = entry.get("sources")
    if not sources or not all(isinstance(name, str) and name for name in _listed(sources)):
        raise UsageError(f"{where}: 'sources' must be a name or a list of names, got {sources!r:.60}")
    if not isinstance(entry.get("target"), str) or not entry["target"]:
        raise UsageError(f"{where}: 'target' must be a name, got {entry.get('target')!r:.60}")
    for key in ("when", "unless"):
        if not isinstance(entry.get(key, {}), dict):
            raise UsageError(f"{where}: {key!r} must be an object: key -> value, got {entry[key]!r:.60}")
    optional = entry.get("optional", False)
    if not isinstance(optional, bool) and not all(isinstance(word, str) for word in _listed(optional)):
        raise UsageError(f"{where}: 'optional' must be true, false, a word or words, got {optional!r:.60}")
    known = _arguments(KINDS[entry["rule"]])
    for key in entry:
        if key not in _OWN and key not in known:
            may = ", ".join(sorted(_OWN | known.keys()))
            raise UsageError(f"{where}: {entry['rule']} has no {key!r}; it may have {may}")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _arguments(kind: type[Rule]) -> dict[str, inspect.Parameter]:
    found = inspect.signature(kind).parameters
    return {name: parameter for name, parameter in found.items() if name not in ("sources", "target")}


def _holds(entry: Mapping[str, Any], sizes: Sizes, where: str) -> bool:
    def told(key: str) -> Any:
        return _told(f"{where}: a condition on", sizes.value, key)

    return all(told(key) == value for key, value in entry.get("when", {}).items()) and not any(
        told(key) == value for key, value in entry.get("unless", {}).items()
    )


def _tied(sizes: Sizes) -> bool:
    try:
        return bool(sizes.value("tie_word_embeddings"))
    except UsageError:
        return False


def _told(where: str, make: Callable[..., Any], *arguments: Any) -> Any:
    """What `make` returns; `where` is put before the text of its UsageError."""
    try:
        return make(*arguments)
    except UsageError as error:
        raise UsageError(f"{where} {error}") from None


def _rule(entry: Mapping[str, Any], names: _Names, where: str) -> Rule:
    kind = KINDS[entry["rule"]]
    arguments: dict[str, Any] = {
        "sources": [_told(f"{where}: 'sources' speaks of", names.of, name) for name in _listed(entry["sources"])],
        "target": _told(f"{where}: 'target' speaks of", names.of, entry["target"]),
    }
    for key, parameter in _arguments(kind).items():
        if key in entry:
            arguments[key] = _argument(entry[key], str(parameter.annotation), names.sizes, f"{where}: {key!r}")
        elif parameter.default is inspect.Parameter.empty:
            raise UsageError(f"{where}: {key!r} is missing, which {entry['rule']} needs")
    try:
        return kind(**arguments)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _argument(value: Any, annotation: str, sizes: Sizes, where: str) -> Any:
    """A rule's argument from its JSON form; `annotation` says what the rule takes."""
    if value is None and "Optional" in annotation:
        return None
    if "Sequence" in annotation or "tuple" in annotation:
        if not isinstance(value, list):
            raise UsageError(f"{where} must be a list of numbers or keys of config.json, got {value!r:.60}")
        return tuple(_told(f"{where} speaks of", sizes.number, each) for each in value)
    if "bool" in annotation:
        found = _told(f"{where} speaks of", sizes.value, value) if isinstance(value, str) else value
        if not isinstance(found, bool):
            raise UsageError(f"{where} must be true, false or a key of config.json that is, got {found!r:.60}")
        return found
    if "int" in annotation:
        return _told(f"{where} speaks of", sizes.number, value)
    if not isinstance(value, (str, float, int)):
        raise UsageError(f"{where} must be a text or a number, got {value!r:.60}")
    return value


class _Names:
    """Names of a rule file, with numbers filled in."""

    def __init__(self, sizes: Sizes, bounds: Mapping[str, Any]) -> None:
        self.sizes, self._bounds = sizes, bounds

    def of(self, name: str) -> str:
        """A name with `{=key}` and bounds as numbers. Raises UsageError."""
        text = _NUMBER.sub(lambda found: str(self.sizes.number(found[1])), name)
        text = _BOUNDED.sub(lambda found: self._placeholder(found[1], found[2], found[3]), text)
        Pattern(text)
        return text

    def _placeholder(self, low: Optional[str], key: str, high: Optional[str]) -> str:
        high = self._bounds.get(key) if high is None else high
        begin = "" if low is None else f"{self.sizes.number(low)}<="
        end = 0 if high is None else self.sizes.number(high)
        if end > _MOST:
            raise UsageError(f"{high!r}, which is {end}: more than any model has")
        return "{" + begin + key + ("" if high is None else f"<{end}") + "}"
