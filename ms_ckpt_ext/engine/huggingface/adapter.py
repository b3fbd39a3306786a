"""LoRA adapters in a folder of their own, as PEFT saves them: what they add to which weights of a model.

    adapter_config.json          lora_alpha, r, use_rslora, fan_in_fan_out, rank_pattern, alpha_pattern, …
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight (r, n), and …lora_B.weight (m, r)

1. The configuration is checked: some of what PEFT trains is no sum of a weight and a product, and is refused.
2. The names of the tensors give the modules. To the weight of a module, `MODULE.weight`, factor · B A is added, where
   factor is alpha / r, or alpha / √r with `use_rslora`; to embeddings and weights stored as (in, out) its transpose.
3. That makes weight rules (`AddProduct`) that go between those that make floats of stored weights and those that move
   them; and the adapter's file is one more file of the checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.computing.rules import AddProduct
from ms_ckpt_ext.core.geometry.array import Shape
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.rule import Rule
from ms_ckpt_ext.core.planning.weight_rules import Transpose
from ms_ckpt_ext.engine.huggingface.adapter_config import ELSEWHERE, AdapterConfig
from ms_ckpt_ext.engine.huggingface.rule_file import TIED
from ms_ckpt_ext.engine.huggingface.sizes import Config
from ms_ckpt_ext.engine.huggingface.weights import same_bytes
from ms_ckpt_ext.engine.source.catalog import Catalog, whole_tensor
from ms_ckpt_ext.engine.source.listing import Listing
from ms_ckpt_ext.errors import CoverageError, DiscoveryError, FormatError, LayoutMismatchError, UsageError, some
from ms_ckpt_ext.formats.index import FileIndex
from ms_ckpt_ext.formats.registry import PLAIN, Access, read_index
from ms_ckpt_ext.formats.table import SAFETENSORS
from ms_ckpt_ext.storage.reader import read_json

_CONFIG, _WEIGHTS = "adapter_config.json", f"adapter_model{SAFETENSORS.suffix}"
_BEFORE = "base_model.model."
_NAME = re.compile(r"base_model\.model\.([^{}]+)\.lora_(embedding_)?([AB])(\.weight)?", re.DOTALL)
_COPY = re.compile(r"base_model\.model\.([^{}]+)\.base_layer\.weight", re.DOTALL)
"""What PEFT saves beside products for an embedding: the embedding as it was."""


class _Module(NamedTuple):
    """What is added to the weight of a module: whether that is an embedding, and the factor of the product."""

    name: str
    embedding: bool
    factor: float


class Adapter(NamedTuple):
    """An adapter, its configuration checked and the header of its weights read.

    Attributes:
        folder: where it is.
        table: of contents of its weights' file.
        modules: what is added, by modules.
        copies: tensors that are weights of the model, saved with it, by modules.
        transposed: weights are stored as (in, out).
        targets: ends of names of modules that it was trained for.
    """

    folder: str
    table: FileIndex
    modules: tuple[_Module, ...]
    copies: Mapping[str, str]
    transposed: bool
    targets: tuple[str, ...]

    @property
    def weights(self) -> list[str]:
        """The weights that it changes."""
        return [f"{module.name}.weight" for module in self.modules]

    def rules(self, dtype: Optional[str] = None) -> list[Rule]:
        """Weight rules that add the products, to weights by Hugging Face's names; `dtype` as of `AddProduct`."""
        if len({module.factor for module in self.modules}) == 1:
            kinds = {module.embedding: module._replace(name="{*}") for module in self.modules}
            return [rule for module in kinds.values() for rule in self._rules(module, dtype)]
        return [rule for module in self.modules for rule in self._rules(module, dtype)]

    def _rules(self, module: _Module, dtype: Optional[str]) -> list[Rule]:
        weight, (a, b) = f"{module.name}.weight", _names(module)
        if not (module.embedding or self.transposed):
            return [AddProduct([weight, b, a], weight, module.factor, dtype)]
        left, right = f"{_BEFORE}{module.name}.left", f"{_BEFORE}{module.name}.right"
        added = AddProduct([weight, left, right], weight, module.factor, dtype)
        return [Transpose(a, left), Transpose(b, right), added]

    def among(self, rules: Sequence[Rule]) -> list[Rule]:
        """The rules of a load with the products added to what its first rules make floats of."""
        first = next((number for number, rule in enumerate(rules) if not rule.computes), len(rules))
        return [*rules[:first], *self.rules(), *rules[first:]]

    def require(self, names: Collection[str]) -> None:
        """Raise CoverageError unless a model with tensors of these names has the weights that it changes."""
        absent = [name for name in self.weights if name not in names]
        if absent:
            raise CoverageError(
                f"the adapter {self.folder!r} changes {len(absent)} weights that the model does not have: "
                f"{some(absent)}; the model has {some(sorted(names))}. Is it an adapter of this model, and are its "
                "names those of Hugging Face's class for causal language models?"
            )
        for target in self.targets:
            met = [name for name in names if f".{name}".endswith(f".{target}.weight")]
            if met and not any(f".{module.name}".endswith(f".{target}") for module in self.modules):
                raise CoverageError(
                    f"by its {_CONFIG} the adapter {self.folder!r} was trained for {target!r}, which is {some(met)} of "
                    f"the model, and {_WEIGHTS} has nothing for it: get the adapter anew from where it comes from"
                )

    def require_untied(self, tied: Mapping[str, str]) -> None:
        """Raise UsageError when it changes one of two tensors (name -> other name) that are one in the model."""
        for name in self.weights:
            if name in tied or name in tied.values():
                raise UsageError(
                    f"the adapter {self.folder!r} changes {name!r}, which is one tensor with another of the model "
                    f"({' and '.join(map(repr, next(iter(tied.items()))))}, by tie_word_embeddings): the other would "
                    "change with it. Untie them: save the model with both and tie_word_embeddings false"
                )

    def require_untied_by(self, config: Config) -> None:
        """The same, where the model's configuration ties its embeddings."""
        if config.values.get("tie_word_embeddings"):
            self.require_untied(TIED)

    def beside(self, listing: Listing) -> Listing:
        """A model's files and the adapter's. Raises UsageError: they are the files of a training's ranks."""
        if listing.sharded or listing.folder is not None:
            raise UsageError(
                f"an adapter ({self.folder!r}) is added to a model by Hugging Face's names, and these are the files of "
                "a training: give the adapter when they are exported"
            )
        if self.copies:
            raise UsageError(
                f"the adapter {self.folder!r} has the model's own {some(sorted(self.copies))}, which a load does not "
                "compare: add the adapter to a copy of the model (ms-ckpt merge --adapter), and load that"
            )
        if listing.files.get(_WEIGHTS, self.table.path) != self.table.path:
            raise UsageError(
                f"{listing.files[_WEIGHTS]!r} lies beside the model, and the adapter is in {self.folder!r}: move the "
                "one away that is not meant"
            )
        return listing._replace(files={**listing.files, _WEIGHTS: self.table.path})

    def added(self, catalog: Catalog) -> Catalog:
        """A model's catalog with the adapter's file and its tensors.

        Raises as `require`, and LayoutMismatchError when it was saved with other weights than the model has.
        """
        self.require(catalog.tensors.keys())
        number = len(catalog.files)
        own = {name: whole_tensor(name, entry, [number]) for name, entry in self.table.tensors.items()}
        found = catalog._replace(files=(*catalog.files, self.table), tensors={**catalog.tensors, **own})
        for module, copy in self.copies.items():
            if not same_bytes(found, f"{module}.weight", copy):
                raise LayoutMismatchError(
                    f"{copy!r} in {self.table.path!r}, the weight that was trained with, differs from the model's "
                    f"{f'{module}.weight'!r}: is it an adapter of this model, and of this dtype? {ELSEWHERE}"
                )
        copies = self.copies.values()
        return found._replace(tensors={name: held for name, held in found.tensors.items() if name not in copies})

    def merged(self, catalog: Catalog, dtype: Optional[str] = None) -> Catalog:
        """A model's catalog with the products added. Raises as `require`, and LayoutMismatchError for other shapes."""
        found = self.added(catalog)
        return found._replace(tensors=apply_rules(found.tensors, self.rules(dtype)))


def _names(module: _Module) -> tuple[str, str]:
    """The tensors A and B."""
    before, after = f"{_BEFORE}{module.name}.lora_", "" if module.embedding else ".weight"
    middle = "embedding_" if module.embedding else ""
    return f"{before}{middle}A{after}", f"{before}{middle}B{after}"


def read_adapter(folder: str, access: Access = PLAIN) -> Adapter:
    """Read the configuration of an adapter and the header of its weights.

    Args:
        access: of encrypted files; they need not be encrypted.

    Raises:
        DiscoveryError: one of the two files is not there.
        UsageError: an adapter of a kind that cannot be added to weights as a product; says which.
        FormatError, LayoutMismatchError, CoverageError: its files do not follow PEFT's format; names key or tensor.
        StorageError: a file cannot be read.
    """
    paths = [os.path.join(folder, name) for name in (_CONFIG, _WEIGHTS)]
    for path in paths:
        if not os.path.isfile(path):
            raise DiscoveryError(
                f"there is no {path!r}: an adapter is a folder with {_CONFIG} and {_WEIGHTS}, as PEFT's "
                "save_pretrained writes it (not with safe_serialization=False)"
            )
    config = AdapterConfig(read_json(paths[0], "the configuration"), paths[0])
    config.check()
    index = read_index(paths[1], access._replace(optional=True))
    copies = {found[1]: name for name, found in ((name, _COPY.fullmatch(name)) for name in index.tensors) if found}
    modules = tuple(_modules(index, config, copies))
    return Adapter(folder, index, modules, copies, config.flag("fan_in_fan_out"), config.targets())


def _modules(index: FileIndex, config: AdapterConfig, copies: Mapping[str, str]) -> Iterable[_Module]:
    shapes: dict[tuple[str, bool], dict[str, Shape]] = {}
    for name, entry in index.tensors.items():
        if name in copies.values():
            continue
        found = _NAME.fullmatch(name)
        if found is None or bool(found[2]) == bool(found[4]):
            raise UsageError(
                f"{index.path!r} holds {name!r}, which is none of the tensors of LoRA's products "
                f"({_BEFORE}MODULE.lora_A.weight and …lora_B.weight, or lora_embedding_A and …_B): what it is would be "
                f"lost; {ELSEWHERE}"
            )
        shapes.setdefault((found[1], bool(found[2])), {})[found[3]] = entry.shape
    alone = [copies[name] for name in copies if (name, True) not in shapes]
    if alone:
        raise UsageError(f"{index.path!r} holds {alone[0]!r}, a whole weight, and nothing to add to it; {ELSEWHERE}")
    if not shapes:
        raise FormatError(f"{index.path!r} holds no tensors, so it is no adapter")
    for (name, embedding), halves in shapes.items():
        if len(halves) < 2:
            (half,) = halves
            raise CoverageError(
                f"{index.path!r} has {'A' if half == 'A' else 'B'} of {name!r}, and not the other half of the product: "
                "get the adapter anew from where it comes from"
            )
        a, b = halves["A"], halves["B"]
        rank = a[0] if len(a) == 2 else 0
        wanted = config.rank(name)
        if len(b) != 2 or b[1] != rank or not all((*a, *b)) or wanted not in (None, rank):
            raise LayoutMismatchError(
                f"{index.path!r} has A of shape {list(a)} and B of shape {list(b)} for {name!r}, which should be "
                f"(r, n) and (m, r)" + ("" if wanted is None else f" with r {wanted}, by {config.path!r}")
            )
        yield _Module(name, embedding, config.factor(name, rank))
