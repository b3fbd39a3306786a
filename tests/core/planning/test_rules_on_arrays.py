"""Weight rules spelled out: a box of what one makes, taken out of arrays piece by piece, is what numpy has there."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np
import pytest

from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.geometry.strided import strides_of
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.pieces import SourceTensor, TensorMeta, locate, stored_whole
from ms_ckpt_ext.errors import LayoutMismatchError
from ms_ckpt_ext.rules import QKV, Concat, Crop, Experts, Interleave, Part, Rename, Rule, Stack, Transpose


def array(first: int, *shape: int) -> np.ndarray:
    return np.arange(first, first + np.prod(shape)).reshape(shape)


A, B, C = array(100, 4, 6), array(200, 4, 6), array(300, 2, 6)
HELD = {"a": A, "b": B, "c": C, "cube": array(400, 2, 3, 4), "odd.0": A, "odd.1": C}
HELD |= {f"e.{n}.{name}": array(1000 * n + start, 3, 5) for n in range(2) for name, start in (("g", 500), ("u", 600))}
G = np.stack([HELD["e.0.g"], HELD["e.1.g"]])
U = np.stack([HELD["e.0.u"], HELD["e.1.u"]])
BOTH = np.concatenate([G, U], axis=1)
EXPERTS = ["e.{n}.g", "e.{n}.u"]
CASES: list[tuple[Rule, np.ndarray]] = [
    (Rename("a", "t"), A),
    (Concat(["a", "b", "c"], "t"), np.concatenate([A, B, C])),
    (Concat(["a", "b"], "t", axis=-1), np.concatenate([A, B], axis=1)),
    (QKV(["a", "b", "c"], "t", groups=2), np.concatenate([A[:2], B[:2], C[:1], A[2:], B[2:], C[1:]])),
    (QKV(["a", "b"], "t", groups=3, axis=1), np.concatenate([w[:, n : n + 2] for n in (0, 2, 4) for w in (A, B)], 1)),
    (Interleave(["a", "b"], "t"), np.stack([A, B], axis=1).reshape(8, 6)),
    (Interleave(["a", "b"], "t", rows=2), np.concatenate([A[:2], B[:2], A[2:], B[2:]])),
    (Interleave(["a", "b"], "t", axis=1), np.stack([A, B], axis=2).reshape(4, 12)),
    (Stack(["a", "b"], "t"), np.stack([A, B])),
    (Stack(["a", "b"], "t", axis=1), np.stack([A, B], axis=1)),
    (Stack(["a", "b"], "t", axis=2), np.stack([A, B], axis=2)),
    (Stack(["a", "b"], "t", axis=-1), np.stack([A, B], axis=-1)),
    (Stack(["a", "b"], "t", axis=-3), np.stack([A, B], axis=-3)),
    (Stack("e.{n}.g", "t", axis=1), np.stack([HELD["e.0.g"], HELD["e.1.g"]], axis=1)),
    (Transpose("a", "t"), A.T),
    (Transpose("cube", "t"), HELD["cube"].transpose()),
    (Transpose("cube", "t", (1, 2, 0)), HELD["cube"].transpose(1, 2, 0)),
    (Experts("e.{n}.g", "t"), G.transpose(0, 2, 1).reshape(10, 3)),
    (Experts(EXPERTS, "t"), BOTH.transpose(0, 2, 1).reshape(10, 6)),
    (Experts(EXPERTS, "t", merge=False), BOTH.transpose(0, 2, 1)),
    (Experts(EXPERTS, "t", transpose=False), BOTH.reshape(12, 5)),
    (Experts(EXPERTS, "t", transpose=False, merge=False, experts=2, shares=(2, 2)), BOTH),
    (Part("a", "t", 1, 2), A[2:]),
    (Part("cube", "t", 2, 3, axis=1), HELD["cube"][:, 2:]),
    (Part("cube", "t", 0, 4, axis=-1), HELD["cube"][..., :1]),
    (Crop("cube", "t", 2, axis=1), HELD["cube"][:, :2]),
]


def played(tensor: SourceTensor, box: Region, held: Mapping[str, np.ndarray]) -> np.ndarray:
    """A box of a tensor, every element of it written once."""
    found, written = np.zeros(box.size, int), np.zeros(box.size, int)
    for piece, files, name, computed in locate(tensor, box):
        assert files == (0,)
        assert computed is None
        offset, strides = piece.view or (0, strides_of(box.shape))
        ranges = (range(low, high) for low, high in zip(piece.in_target.start, piece.in_target.stop))
        places = [offset + sum(at * stride for at, stride in zip(index, strides)) for index in product(*ranges)]
        found[places] = held[name].reshape(piece.source_shape)[piece.in_source.slices].ravel()
        written[places] += 1
    assert (written == 1).all()
    return found.reshape(box.shape)


@pytest.mark.parametrize(("rule", "expected"), CASES)
def test_what_a_rule_makes(rule: Rule, expected: np.ndarray) -> None:
    tensors = {name: stored_whole(TensorMeta(name, DTYPES["I64"], each.shape), (0,)) for name, each in HELD.items()}
    made = apply_rules(tensors, [rule])["t"]
    assert made.meta.shape == expected.shape
    inner = Region(tuple(extent // 3 for extent in expected.shape), expected.shape)
    for box in (Region.whole(expected.shape), inner):
        assert played(made, box, HELD).tolist() == expected[box.slices].tolist()


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (Stack(["a", "b"], "t", axis=3), "there is no axis 3 among 3"),
        (Stack(["a", "b"], "t", axis=-4), "there is no axis -4 among 3"),
        (Concat(["a", "b"], "t", axis=2), "there is no axis 2 among 2"),
        (Part("a", "t", 0, 2, axis=-3), "there is no axis -3 among 2"),
        (Experts(["a", "e.1.g"], "t"), "not filled exactly"),
        (Experts(["e.1.g", "a"], "t"), "not filled exactly"),
        (Experts("odd.{n}", "t"), "its sources must have one shape"),
        (Concat(["a", "cube"], "t"), "cannot be joined along axis 0"),
        (Interleave(["a", "c"], "t"), "its sources must have one shape"),
        (Interleave(["a", "b"], "t", rows=3), "no multiple of 3 rows"),
    ],
)
def test_what_does_not_fit(rule: Rule, told: str) -> None:
    tensors = {name: stored_whole(TensorMeta(name, DTYPES["I64"], each.shape), (0,)) for name, each in HELD.items()}
    with pytest.raises(LayoutMismatchError, match=told):
        apply_rules(tensors, [rule])
