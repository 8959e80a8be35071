"""The staleness bound holds whatever finishes first."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cispo.buffer import Buffer
from cispo.types import Group, Prompt, RunError, Trajectory


def group(number, version):
    empty = torch.empty(0)
    trajectory = Trajectory(empty.long(), empty.bool(), empty, empty.long(), "", 0.0, {}, False)
    return Group(Prompt(f"p{number}", (1,), ""), (trajectory,), number, version)


@settings(max_examples=200, deadline=None)
@given(
    staleness=st.sampled_from([0, 1, 3, 8]),
    per_step=st.integers(1, 5),
    drop_share=st.floats(0, 0.5),
    seed=st.integers(0, 2**32),
)
def test_staleness_never_exceeds_its_bound(staleness, per_step, drop_share, seed):
    """A simulated run: groups finish in random order, some are dropped; the trainer takes what is ready."""
    chance = random.Random(seed)
    buffer, version, at = Buffer(per_step, staleness), 0, {}
    steps = 0
    while steps < 12:
        while buffer.admissible(version) > 0:
            at[buffer.admit(version)] = version
        for number in chance.sample(buffer.outstanding, k=chance.randint(0, len(buffer.outstanding))):
            if chance.random() < drop_share:
                buffer.drop(number)
            else:
                buffer.put(group(number, at[number]))
        if buffer.ready:
            taken = buffer.take()
            assert [g.admission for g in taken] == sorted(g.admission for g in taken)
            assert all(version - g.version <= staleness for g in taken)
            steps += 1
            version += 1
    assert buffer.admitted <= (staleness + version + 1) * per_step


def test_synchronous_means_every_group_is_written_by_the_policy_that_trains_on_it():
    buffer = Buffer(2, 0)
    assert [buffer.admit(0), buffer.admit(0)] == [0, 1]
    with pytest.raises(RunError, match="staleness bound 0"):
        buffer.admit(0)
    buffer.put(group(1, 0))
    assert not buffer.ready
    buffer.put(group(0, 0))
    assert [g.admission for g in buffer.take()] == [0, 1]
    assert buffer.admissible(0) == 0 and buffer.admissible(1) == 2


def test_a_dropped_group_returns_its_slot():
    buffer = Buffer(1, 0)
    buffer.drop(buffer.admit(0))
    assert buffer.admissible(0) == 1


def test_a_group_comes_once():
    buffer = Buffer(1, 0)
    buffer.admit(0)
    buffer.put(group(0, 0))
    with pytest.raises(RunError, match="twice"):
        buffer.put(group(0, 0))
    with pytest.raises(RunError, match="not admitted"):
        buffer.put(group(5, 0))


def test_a_restored_buffer_goes_on_where_it_stopped():
    buffer = Buffer(2, 1)
    for _ in range(4):
        buffer.admit(0)
    buffer.put(group(2, 0))
    other = Buffer(2, 1)
    other.restore(
        admitted=buffer.admitted,
        next_number=buffer.next_number,
        outstanding=buffer.outstanding,
        finished=buffer.finished,
    )
    for b in (buffer, other):
        b.put(group(0, 0))
        b.put(group(1, 0))
    assert [g.admission for g in buffer.take()] == [g.admission for g in other.take()] == [0, 1]
    assert other.admissible(1) == buffer.admissible(1) == 2
