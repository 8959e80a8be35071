"""Advantages against hand-computed numbers and their laws."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cispo import advantages
from cispo.types import ConfigError, DataError

KINDS = ["group", "group_mean", "leave_one_out", "batch_std", "none"]
GROUPS = st.lists(st.lists(st.one_of(st.none(), st.floats(-100, 100)), max_size=6), max_size=5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("group", [[0.866025, -0.866025, 0.866025, -0.866025], [1.5, -0.5, -0.5, -0.5]]),
        ("group_mean", [[0.5, -0.5, 0.5, -0.5], [1.5, -0.5, -0.5, -0.5]]),
        ("leave_one_out", [[2 / 3, -2 / 3, 2 / 3, -2 / 3], [2.0, -2 / 3, -2 / 3, -2 / 3]]),
        # centred squares sum to 1 + 3 = 4 over 8 - 1 degrees of freedom
        ("batch_std", [[0.661438, -0.661438, 0.661438, -0.661438], [1.984313, -0.661438, -0.661438, -0.661438]]),
        ("none", [[1.0, 0.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0]]),
    ],
)
def test_by_hand(kind, expected):
    got = advantages.compute(kind, [[1, 0, 1, 0], [2, 0, 0, 0]])
    for row, want in zip(got, expected):
        assert row == pytest.approx(want, abs=3e-6)


@pytest.mark.parametrize("kind", ["group", "group_mean", "leave_one_out", "batch_std"])
@pytest.mark.parametrize("rewards", [[0.1] * 3, [1e8 + 0.1] * 7, [0.7], [], [None, None], [0.3, None]])
def test_a_group_with_nothing_to_compare_gets_exactly_zero(kind, rewards):
    (row, other) = advantages.compute(kind, [rewards, [1.0, 0.0]])
    assert row == [0.0] * len(rewards)
    assert other[0] > 0 > other[1]


@pytest.mark.parametrize("kind", KINDS)
@given(groups=GROUPS)
def test_none_rewards_are_as_if_absent_and_get_zero(kind, groups):
    got = advantages.compute(kind, groups)
    without = advantages.compute(kind, [[r for r in g if r is not None] for g in groups])
    for row, g, kept in zip(got, groups, without):
        assert [a for a, r in zip(row, g) if r is not None] == kept
        assert all(a == 0.0 for a, r in zip(row, g) if r is None)
        assert all(math.isfinite(a) for a in row)


@pytest.mark.parametrize("kind", ["group", "group_mean", "leave_one_out", "batch_std"])
@given(groups=GROUPS)
def test_a_baseline_leaves_each_group_with_mean_zero(kind, groups):
    for row, g in zip(advantages.compute(kind, groups), groups):
        # group divides by std + 1e-6, which can amplify rounding where the spread is tiny
        assert sum(row) == pytest.approx(0.0, abs=1e-5 * max(1, len(g)) * max([1.0, *map(abs, row)]))


@given(groups=GROUPS)
def test_groups_are_told_apart_by_place_not_by_content(groups):
    twice = advantages.compute("group", groups + groups)
    assert twice == advantages.compute("group", groups) * 2


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="'grpo'.*group_mean"):
        advantages.compute("grpo", [[1.0]])
    with pytest.raises(DataError, match="completion 1 in group 1"):
        advantages.compute("none", [[1.0], [0.0, math.nan]])
