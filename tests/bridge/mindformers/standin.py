"""What MindFormers lacks on this machine, none of it checkpoint code; import before mindformers.

* `hyper_parallel`, a requirement that is not on PyPI, as names without a body: it serves PyNative mode, and MindFormers
  2.0 imports it at the top of models that are not used here. Its own checkpoint module stays missing, so MindFormers
  takes the way that it has for that.
* `nltk` and `datasets` likewise: they serve metrics and data that no test here has, and take long to import.
* Operators without a CPU kernel (`operators()`): RmsNorm, Outer, FlashAttentionScore, the gradient of embedding, the
  overflow check; and two collectives (`collectives()`): the barrier, scattering objects.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any


class _Name(type):
    """A class of which every attribute is the class itself."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _make(name)


def _make(name: str) -> type:
    body = {
        "__init__": lambda self, *_, **__: None,
        "__getattr__": lambda self, inner: _make(inner),
        "__call__": lambda self, *_, **__: self,
    }
    return _Name(name, (), body)


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _make(name)


_EMPTY = ("hyper_parallel", "nltk", "datasets")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] not in _EMPTY or name.startswith("hyper_parallel.core.distributed_checkpoint"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _Module(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.insert(0, _Finder())


def operators() -> None:
    """Replace operators that the CPU back end lacks; good for names, shapes and bytes, not for numerics of a model."""
    import mindformers.parallel_core.training_graph.base_models.common.embeddings.rotary_pos_embedding as rotary
    import mindformers.parallel_core.training_graph.transformer.flash_attention as attention
    import mindformers.parallel_core.training_graph.transformer.norm as norm
    import mindspore as ms
    import mindspore.mint.nn.functional as functional
    from mindformers.wrapper.wrapper import MFTrainOneStepCell
    from mindspore import nn, ops

    class Outer(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.mul = ops.Mul()

        def construct(self, a: Any, b: Any) -> Any:
            return self.mul(a.reshape((-1, 1)), b.reshape((1, -1)))

        def shard(self, *_: Any) -> Any:
            return self

    class Attention(nn.Cell):
        """BNSD."""

        def __init__(self, head_num: int, keep_prob: float = 1.0, scale_value: float = 1.0, **_: Any) -> None:
            super().__init__()
            self.scale = scale_value
            self.scores = ops.BatchMatMul(transpose_b=True)
            self.values = ops.BatchMatMul()
            self.softmax = ops.Softmax(-1)

        def shard(self, *_: Any) -> Any:
            return self

        def add_prim_attr(self, *_: Any) -> Any:
            return self

        def construct(
            self,
            q: Any,
            k: Any,
            v: Any,
            alibi: Any,
            drop: Any,
            pad: Any,
            mask: Any,
            prefix: Any = None,
            q_lengths: Any = None,
            kv_lengths: Any = None,
        ) -> Any:
            dtype = v.dtype
            q, k, v = ops.cast(q, ms.float32), ops.cast(k, ms.float32), ops.cast(v, ms.float32)
            groups = q.shape[1] // k.shape[1]
            if groups > 1:
                k, v = ops.repeat_interleave(k, groups, 1), ops.repeat_interleave(v, groups, 1)
            scores = self.scores(q, k) * self.scale
            if mask is not None:
                scores = scores + ops.cast(mask, ms.float32) * -10000.0
            weights = self.softmax(scores)
            return weights, weights, weights, ops.cast(self.values(weights, v), dtype)

    norm.FusedRMSNorm, norm.FusedLayerNorm = norm.RMSNorm, norm.LayerNorm
    rotary.Outer = Outer
    attention.FlashAttentionScore = Attention
    functional.embedding = lambda inputs, weight, *_, **__: ops.gather(weight, inputs, 0)
    MFTrainOneStepCell.start_overflow_check = lambda self, condition, inputs: (False, inputs)
    MFTrainOneStepCell.get_overflow_status = lambda self, status, outputs: False
    MFTrainOneStepCell.process_loss_scale = lambda self, overflow: overflow


def affinity() -> None:
    """Bind no process to the processors of its device, which a CPU does not count."""
    module = importlib.import_module("mindformers.core.context.build_context")
    setattr(module, "set_ms_affinity", lambda *_: None)  # noqa: B010 - a module that mypy does not know


def collectives(rank: int, size: int) -> None:
    """Replace collectives that MCCL lacks by those it has."""
    import mindformers.checkpoint.fully_parallel as fully_parallel
    from mindspore.communication import comm_func
    from mindspore.mint.distributed import all_gather_object, barrier

    from ms_ckpt_ext.bridge import names

    def scatter_object_list(out: list, objects: Any = None, src: int = 0, group: Any = None) -> None:
        gathered: list[Any] = [None] * size
        all_gather_object(gathered, objects)
        out[0] = gathered[src][rank]

    names.replace({comm_func.barrier: barrier}, everywhere=True)
    fully_parallel.scatter_object_list = scatter_object_list
