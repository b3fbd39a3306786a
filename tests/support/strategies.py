"""Random layouts and shapes that fit them, for property tests."""

from __future__ import annotations

from math import prod

from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.errors import StrategyError

dtypes = st.sampled_from([DTYPES[name] for name in ("F32", "BF16", "U8", "I64")])


@st.composite
def layouts(draw: st.DrawFn, ndim: int, devices: int = 64) -> Layout:
    """Any layout of `ndim` axes on at most `devices` devices: nested maps, full and partial optimizer shards."""
    dev_matrix = []
    for extent in draw(st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=4)):
        if prod(dev_matrix) * extent <= devices:
            dev_matrix.append(extent)
    dev_matrix = dev_matrix or [1]
    groups: list[list[int]] = [[] for _ in range(ndim)]
    for axis in draw(st.permutations(range(len(dev_matrix)))):
        where = draw(st.integers(-1, ndim - 1))
        if where >= 0:
            groups[where].append(axis)
    tensor_map = tuple(map(tuple, groups))
    size = draw(st.sampled_from([0, -1, 2, 3, 4, 6, 8]))
    try:
        return Layout(tuple(dev_matrix), tensor_map, 1 if size else 0, size)
    except StrategyError:  # a size the replicas do not make
        return Layout(tuple(dev_matrix), tensor_map)


@st.composite
def pairs(draw: st.DrawFn, devices: int = 64) -> tuple[Layout, Layout, tuple[int, ...]]:
    """Two layouts of one parameter, and a shape that both can cut."""
    ndim = draw(st.integers(1, 4))
    a, b = draw(layouts(ndim, devices)), draw(layouts(ndim, devices))
    factors = draw(st.lists(st.integers(1, 3), min_size=ndim, max_size=ndim))
    shape = tuple(_lcm(x, y) * f for x, y, f in zip(a.parts, b.parts, factors))
    return a, b, shape


def _lcm(a: int, b: int) -> int:
    from math import gcd

    return a * b // gcd(a, b)
