"""Names behind a wrapper's prefix: literal tables, and properties over networks that were wrapped by any name."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ms_ckpt_ext.core.planning.suffixes import match_suffixes
from ms_ckpt_ext.errors import LayoutMismatchError

STATES = [
    *("adam_m", "adam_v", "lamb_m", "lamb_v", "muon_m", "moment", "moments", "moment1", "moment2", "moments1", "vhat"),
    *("accum", "accum_update", "accu_grads", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "mean_grad"),
    *("mean_square", "momentum", "momentum_buf", "grad_accumulation", "step_size", "pma_weight_ema"),
    "optimizer.state.exp_avg",
]


def found(missing: str, stored: str, named: str = "") -> dict[str, str]:
    """`missing` and `named` of a network in a checkpoint that has `stored`; names are parted by blanks."""
    contents = {name: name for name in stored.split()}
    return dict(match_suffixes(missing.split(), named.split(), contents).found)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("order", [1, -1])
def test_a_state_is_no_weight_in_any_order(state: str, order: int) -> None:
    stored = ["net.d.w", "net.d.b", f"{state}.net.d.w", f"{state}.net.d.b", "other.x"][::order]
    assert found("d.w d.b", " ".join(stored)) == {"d.w": "net.d.w", "d.b": "net.d.b"}
    assert found("w b", f"{state}.w {state}.b") == {}  # every weight is lost


@pytest.mark.parametrize("state", ["exp_avg_sq_row_net", "exp_avg_insta_col_net", "mu_net", "eta_net"])
def test_states_whose_word_runs_into_the_name(state: str) -> None:
    assert found("d.w", f"{state}.d.w net.d.w") == {"d.w": "net.d.w"}


def test_a_wrapper_may_begin_as_such_a_word_does() -> None:
    """Nothing lies beside it that it could be the state of; and what lies behind another word is no state."""
    assert found("d.w", "mu_net.d.w") == {"d.w": "mu_net.d.w"}
    assert found("d.w", "mu_net.d.w net.d.w") == {"d.w": "net.d.w"}
    with pytest.raises(LayoutMismatchError, match="'xx_net.d.w', 'net.d.w'"):
        found("d.w", "xx_net.d.w net.d.w")


def test_the_first_of_several_is_the_example() -> None:
    with pytest.raises(LayoutMismatchError) as caught:
        found("d.w", " ".join(f"{n}.d.w" for n in "pqrstu"))
    assert "'p.d.w', 'q.d.w', 'r.d.w', 's.d.w' and 2 more. " in str(caught.value)
    assert "such as {'d.w': 'p.d.w'}" in str(caught.value)


@pytest.mark.parametrize("group", ["linear", "ema", "zeta", "opt.group0.zeta"])
def test_groups_are_told_by_their_form(group: str) -> None:
    """No word of an optimizer: `group.t` and `t` are both there, so all of the group belongs to what lies beside."""
    assert found("w b", f"{group}.net.w net.w net.b {group}.net.b") == {"w": "net.w", "b": "net.b"}
    assert found("b", f"w {group}.w {group}.b", named="w") == {}
    assert found("w b", f"net.w {group}.net.w {group}.net.b") == {"w": "net.w"}
    told = match_suffixes(["b"], ["w"], {name: name for name in ("w", f"{group}.w", f"{group}.b")})
    assert told.passed == {"b": f"{group}.b"}


def test_a_name_of_the_wrapper_that_ends_alike_makes_no_group() -> None:
    """The wrapper's own `weight` and `scale` end as names below its prefix do, but stand for none of the network's."""
    assert found("d.weight d.bias", "weight scale net.d.weight net.d.bias") == {
        "d.weight": "net.d.weight",
        "d.bias": "net.d.bias",
    }


def test_a_parameter_of_the_wrapper_that_has_a_name_of_the_network_by_chance() -> None:
    """`head.w` is the wrapper's, and the network's is `net.head.w`; or it is not: a map says so."""
    weights = ["net.head.w", "net.a.w", "net.b.w"]
    stored = ["head.w", *weights, *(f"adam_m.{name}" for name in ("head.w", *weights))]
    with pytest.raises(
        LayoutMismatchError, match="has both 'head.w' and 'net.head.w': whether what begins with 'net.'"
    ):
        found("a.w b.w", " ".join(stored), named="head.w")
    held = {"head.w": "net.head.w", **{name: name for name in stored[1:]}}
    assert match_suffixes(["a.w", "b.w"], ["head.w"], held, ["head.w"]).found == {"a.w": "net.a.w", "b.w": "net.b.w"}


@pytest.mark.parametrize("beside", ["", "net."])
@pytest.mark.parametrize("group", ["zeta", "q.zeta"])
@pytest.mark.parametrize("kept", range(1, 9))
def test_weights_are_not_made_up_however_many_are_lost(group: str, beside: str, kept: int) -> None:
    names = [f"c{n}.w" for n in range(9)]
    weights, states = [f"{beside}{name}" for name in names[:kept]], [f"{group}.{beside}{name}" for name in names]
    named = names[: 0 if beside else kept]
    arguments = " ".join(names[len(named) :]), " ".join([*states, *weights]), " ".join(named)
    if kept >= 5:
        assert found(*arguments) == (dict(zip(names, weights)) if beside else {})
    else:
        with pytest.raises(LayoutMismatchError, match=rf"has both '{beside}c\d.w' and '{group}.{beside}c\d.w'"):
            found(*arguments)


@pytest.mark.parametrize(
    ("missing", "stored", "expected"),
    [
        ("0.w 1.w", "block.10.w block.0.w block.1.w", {"0.w": "block.0.w", "1.w": "block.1.w"}),
        ("w", "low xw .w", {"w": ".w"}),
        ("d.w", ".d.w", {"d.w": ".d.w"}),
        ("w", "layer.w10 layer_w a/w", {}),
        ("norm.g", "prenorm.g x.prenorm.g x.norm.g", {"norm.g": "x.norm.g"}),
        ("1.w", "x.11.w", {}),
    ],
)
def test_a_prefix_ends_with_a_dot(missing: str, stored: str, expected: dict[str, str]) -> None:
    assert found(missing, stored) == expected


@pytest.mark.parametrize(
    ("missing", "stored", "prefix"),
    [
        ("w d.w", "net.d.w net.w", "net."),  # net.d.w ends in w as well, but is d.w
        ("w d.w", "net.d.w net.d.d.w", "net.d."),  # net.d.w could be d.w, but then there were no w
        ("w 0.w 1.w", "m.0.w m.1.w m.w", "m."),
        ("0.w 1.w 2.w", "head.0.w net.0.w net.1.w net.2.w", "net."),  # a head serves less than half
        ("a b", "x.y.a x.y.b x.y.c x.z", "x.y."),
        ("moments.w", "net.moments.w adam_m.net.moments.w", "net."),  # a Cell may be called so
    ],
)
def test_one_prefix_serves_the_whole_network(missing: str, stored: str, prefix: str) -> None:
    for order in (1, -1):
        listed = " ".join(stored.split()[::order])
        assert found(missing, listed) == {name: prefix + name for name in missing.split()}


@pytest.mark.parametrize(
    ("missing", "stored", "said"),
    [
        ("w b", "audio.w audio.b text.w text.b", "'audio.w', 'text.w'"),
        ("w", "1.w 2.w 3.w 4.w 5.w 6.w", "'1.w', '2.w', '3.w', '4.w' and 2 more"),
        ("w b", "audio.w audio.b text.w", "'audio.w', 'text.w'"),  # the text's b may be lost
        ("w b c", "x.w x.b y.b y.c", "'x.b', 'y.b'"),
        ("w", "teacher.net.w student.net.w adam_m.student.net.w", "'teacher.net.w', 'student.net.w'"),
    ],
)
def test_several_readings_are_an_error(missing: str, stored: str, said: str) -> None:
    with pytest.raises(LayoutMismatchError, match="which one is meant is not clear") as caught:
        found(missing, stored)
    assert said in str(caught.value)
    assert "choice_func" in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "stored"),
    [("d.w d.b", "fc.d.w norm.d.b"), ("0.w 1.w", "x.0.w y.1.w"), ("l.0.a l.1.b", "x.l.0.a y.l.1.b")],
)
def test_what_belongs_together_comes_from_one_place(missing: str, stored: str) -> None:
    with pytest.raises(LayoutMismatchError, match="not one place"):
        found(missing, stored)


def test_parts_of_several_wrappers() -> None:
    assert found("gen.w gen.b dis.w step", "g.gen.w g.gen.b d.dis.w t.step") == {
        "gen.w": "g.gen.w",
        "gen.b": "g.gen.b",
        "dis.w": "d.dis.w",
        "step": "t.step",
    }
    assert found("x.b", "x.w y.x.b", named="x.w") == {}  # the rest of x has its own names
    assert found("y.b", "x.w net.y.b", named="x.w") == {"y.b": "net.y.b"}


def test_what_a_parameter_took_under_its_own_name_is_no_other_ones() -> None:
    assert found("w", "d.w", named="d.w") == {}
    assert found("w", "d.w net.w", named="d.w") == {"w": "net.w"}


def test_what_a_map_names_is_no_group_and_no_neighbour() -> None:
    """`c` is a copy of `old.c`: it says nothing of `old.w`, nor of what is beside it."""
    held = {"old.c": 1, "d.c": 1, "old.d.w": 2}
    assert match_suffixes(["d.w"], ["d.c"], held, ["d.c"]).found == {"d.w": "old.d.w"}


def test_of_several_states_the_first_is_told() -> None:
    held = {name: name for name in ("adam_m.net.w", "adam_v.net.w", "net.w")}
    assert match_suffixes(["w"], ["net.w"], held).passed == {"w": "adam_m.net.w"}


def test_four_readings_are_all_told() -> None:
    with pytest.raises(LayoutMismatchError, match=r"'1\.w', '2\.w', '3\.w', '4\.w'\. Say so"):
        found("w", "1.w 2.w 3.w 4.w")


def test_how_deep_a_name_may_lie() -> None:
    assert found("w", f"{'a.' * 99}w") == {"w": f"{'a.' * 99}w"}
    assert found("w", f"{'a.' * 100}w") == {}


def test_a_name_that_is_all_dots() -> None:
    assert found("w", "." * 1_000_000 + "w net.w") == {"w": "net.w"}


words = st.text("abw", min_size=1, max_size=2)
names = st.lists(words, min_size=1, max_size=3).map(".".join)
networks = st.lists(names, min_size=1, max_size=6, unique=True)
prefixes = st.lists(st.sampled_from(["net", "model", "x1", "_back", "loss"]), min_size=1, max_size=2).map(".".join)


@given(networks, prefixes, st.lists(st.sampled_from([*STATES, "zeta", "q.zeta"]), unique=True), st.randoms())
def test_a_wrapped_network_and_its_optimizer(
    network: list[str], prefix: str, groups: list[str], random: object
) -> None:
    """Whatever a network, its wrapper and its optimizer are called, in any order: weights, and nothing else."""
    weights = [f"{prefix}.{name}" for name in network]
    stored = [*weights, *(f"{group}.{name}" for group in groups for name in weights), "global_step"]
    random.shuffle(stored)  # type: ignore[attr-defined]
    assert found(" ".join(network), " ".join(stored)) == dict(zip(network, weights))


@given(networks, prefixes, st.sets(st.integers(0, 5)), st.sampled_from([*STATES, "zeta"]))
def test_a_lost_weight_is_not_made_up_from_its_state(
    network: list[str], prefix: str, lost: set[int], group: str
) -> None:
    """Every weight that is there is found, and of those that are not, none comes from a state."""
    weights = {name: f"{prefix}.{name}" for name in network}
    there = {name: stored for number, (name, stored) in enumerate(weights.items()) if number not in lost}
    assume(there or group != "zeta")  # without any weight nothing tells the form of a group
    assume(not any(a != b and b.endswith("." + a) for a in network for b in network))
    stored = [f"{group}.{name}" for name in weights.values()] + list(there.values())
    try:
        told = found(" ".join(network), " ".join(stored))
    except LayoutMismatchError:
        assert group == "zeta" and 2 * len(there) < len(network)
    else:
        assert told == there


@given(networks, st.lists(names, min_size=1, max_size=12, unique=True), st.sets(st.integers(0, 5)))
def test_any_names_at_all(network: list[str], stored: list[str], taken: set[int]) -> None:
    """An error, or what ends in the name behind a dot, each stored name once, and none that has an owner."""
    named = [name for number, name in enumerate(network) if number in taken and name in stored]
    missing = [name for name in network if name not in named and name not in stored]
    try:
        told = found(" ".join(missing), " ".join(stored), " ".join(named))
    except LayoutMismatchError:
        return
    assert set(told) <= set(missing)
    assert all(stored.endswith(f".{name}") for name, stored in told.items())
    assert len(set(told.values())) == len(told)
    assert not set(told.values()) & set(named)
