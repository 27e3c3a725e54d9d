"""Whether something is due is a function of the step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everydream.data.plan import Plan
from everydream.training.clock import Clock, Due


def clock(pictures: int, batch_size: int, per_update: int, total_steps: int = 100) -> Clock:
    names = [f"subject/{i}" for i in range(pictures)]
    return Clock(Plan({(64, 64): names}, batch_size, 1), per_update, total_steps)


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 4), st.integers(0, 40))
def test_an_epoch_ends_at_the_first_border_at_or_after_its_last_micro_batch(
    pictures: int, batch_size: int, per_update: int, step: int
) -> None:
    it = clock(pictures, batch_size, per_update)
    ended = it.epochs_ended(step)
    assert it.plan.micro_batches(ended) <= step * per_update
    if step:
        assert it.ends_epoch(step, 1) == (ended > it.epochs_ended(step - 1))
        assert it.plan.micro_batches(ended + 1) > step * per_update or pictures < batch_size


@given(st.integers(1, 30), st.integers(1, 10))
def test_what_is_due_never_happens_twice_on_a_step(every: int, total: int) -> None:
    due = Due(clock(4, 2, 1, total), every_steps=every, at_start=True, at_end=True)
    done = [step for step in range(total + 1) for _ in range(2) if due(step)]
    assert done == sorted({0, total} | {step for step in range(1, total) if step % every == 0})


def test_a_resumed_run_does_not_repeat_the_turn_of_its_checkpoint() -> None:
    due = Due(clock(4, 2, 1), every_steps=3, last=6)
    assert [step for step in range(6, 13) if due(step)] == [9, 12]


@pytest.mark.parametrize(("every", "steps"), [(1, [4, 8, 12]), (0.5, [2, 4, 6, 8, 10, 12]), (2, [8]), (1.5, [6, 12])])
def test_fractions_of_epochs_count_micro_batches(every: float, steps: list[int]) -> None:
    it = clock(8, 2, 1, 12)
    assert list(it.steps_of_epoch_ends(every)) == steps
    assert [step for step in range(1, 13) if it.ends_epoch(step, every)] == steps


@pytest.mark.parametrize("every", [0.1, 0.2, 0.3, 0.7])
def test_a_tenth_of_an_epoch_is_a_tenth(every: float) -> None:
    it = clock(20, 2, 1, 100)
    tenths = round(every * 10)
    assert list(it.steps_of_epoch_ends(every)) == list(range(tenths, 101, tenths))
    assert [step for step in range(1, 101) if it.ends_epoch(step, every)] == list(range(tenths, 101, tenths))


def test_a_run_without_an_end_costs_nothing_to_plan() -> None:
    it = clock(8, 2, 1, 10**9)
    assert it.epochs_ended(10**9) == 10**9 // 4
    ends = it.steps_of_epoch_ends(20)
    assert [next(ends) for _ in range(3)] == [80, 160, 240]
