"""Reductions as weights, and layouts that cannot change a result."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.batching import make_batch, micro_batches, take_rows, with_reduction
from cispo.types import ConfigError, Trajectory


def trajectory(prompt, completion, *, truncated=False):
    length = prompt + completion
    return Trajectory(
        tokens=torch.arange(length),
        action_mask=torch.arange(length) >= prompt,
        sampler_logprobs=torch.linspace(-2, -1, length),
        versions=torch.zeros(length, dtype=torch.long),
        text="",
        reward=1.0,
        rewards={},
        truncated=truncated,
    )


def test_position_s_predicts_token_s_plus_1_and_only_what_the_policy_wrote_is_trained():
    batch = make_batch([trajectory(2, 3)], [0.5])
    assert batch.rows[0].tolist() == [0, 1, 2, 3]
    assert batch.targets_T.tolist() == [1, 2, 3, 4]
    assert batch.weights_T.tolist() == [0, 1, 1, 1]
    assert batch.columns["advantages"].tolist() == [0.5] * 4
    assert torch.equal(batch.columns["sampler_logprobs"], torch.linspace(-2, -1, 5)[1:])


def test_truncated_rows_can_be_masked():
    batch = make_batch([trajectory(1, 2, truncated=True), trajectory(1, 1)], [1.0, 1.0], mask_truncated=True)
    assert batch.weights_T.tolist() == [0, 0, 1]


# Two prompts: completions of 1 and 3 tokens, and one of 4.
ROWS = [trajectory(1, 1), trajectory(1, 3), trajectory(1, 4)]
GROUPS = [7, 7, 9]


@pytest.mark.parametrize(
    ("kind", "per_row"),
    [
        ("token", [1 / 8] * 3),
        ("prompt", [1 / 2 / 4, 1 / 2 / 4, 1 / 2 / 4]),
        ("sequence", [1 / 3, 1 / 9, 1 / 12]),
        ("constant", [1 / (3 * 10)] * 3),
        ("sum", [1.0] * 3),
    ],
)
def test_reductions_by_hand(kind, per_row):
    batch = with_reduction(make_batch(ROWS, [1.0] * 3), kind, GROUPS, constant=10)
    rows = batch.weights_T.split(batch.lengths)
    for weights, expected in zip(rows, per_row, strict=True):
        assert torch.allclose(weights, torch.tensor(expected))


def test_prompt_mean_weighs_prompts_equally_whatever_their_lengths():
    batch = with_reduction(make_batch([trajectory(1, 1), trajectory(1, 9)], [1.0, 1.0]), "prompt", [0, 1])
    assert [float(w.sum()) for w in batch.weights_T.split(batch.lengths)] == pytest.approx([0.5, 0.5])


def test_rows_without_a_trained_token_do_not_count():
    rows = [trajectory(1, 2), trajectory(1, 2, truncated=True)]
    for kind in ("token", "prompt", "sequence"):
        batch = with_reduction(make_batch(rows, [1.0, 1.0], mask_truncated=True), kind, [0, 1])
        assert float(batch.weights_T.sum()) == pytest.approx(1.0)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    groups=st.data(),
    kind=st.sampled_from(["token", "prompt", "sequence"]),
)
def test_the_means_are_means(lengths, groups, kind):
    owners = [groups.draw(st.integers(0, 3)) for _ in lengths]
    batch = make_batch([trajectory(2, n) for n in lengths], [1.0] * len(lengths))
    assert float(with_reduction(batch, kind, owners).weights_T.sum()) == pytest.approx(1.0, rel=1e-5)


def test_unknown_reductions_are_refused():
    with pytest.raises(ConfigError, match="choose from token"):
        with_reduction(make_batch(ROWS, [1.0] * 3), "mean", GROUPS)
    with pytest.raises(ConfigError, match="algorithm.constant"):
        with_reduction(make_batch(ROWS, [1.0] * 3), "constant", GROUPS)


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40),
    budget=st.integers(1, 400),
    share=st.floats(0, 1),
)
def test_micro_batches_hold_every_row_once_within_budget_and_padding_share(lengths, budget, share):
    batches = micro_batches(lengths, budget=budget, max_padding_share=share)
    assert sorted(i for rows in batches for i in rows) == list(range(len(lengths)))
    for rows in batches:
        padded = len(rows) * max(lengths[i] for i in rows)
        assert len(rows) == 1 or padded <= budget
        assert padded - sum(lengths[i] for i in rows) <= share * padded + 1e-9


def test_taking_rows_takes_their_columns():
    batch = make_batch(ROWS, [1.0, 2.0, 3.0])
    taken = take_rows(batch, [2, 0])
    assert taken.lengths == [4, 1]
    assert taken.columns["advantages"].tolist() == [3.0] * 4 + [1.0]
    assert take_rows(batch, []).lengths == []
    assert math.isclose(float(taken.weights_T.sum()), 5.0)
